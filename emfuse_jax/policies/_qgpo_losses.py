"""Losses of the intermediate energy over actions of a behaviour, and the value they have."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = [
    "LOSSES",
    "contrastive_energy_loss",
    "regression_energy_loss",
    "split_energy_loss",
    "support_value",
]


def contrastive_energy_loss(
    energy: Float[Array, "*batch action"], value: Float[Array, "*batch action"]
) -> Float[Array, "*batch"]:
    """``-Σ_i softmax_i(βQ) log softmax_i(-E_t(a_t^i))``, equation 11.

    All actions of a row are draws of one behaviour, noised to one time. With infinitely many
    of them the optimum is ``E_t = -log E[exp(βQ)|a_t]`` up to a constant of state and time;
    with few the best actions count too little, because they stand in their own
    normaliser (see `split_energy_loss`).

    Args:
        energy: ``E_t`` of the noised actions; low is good.
        value: ``βQ`` of the clean ones.

    Example:
        >>> value = jnp.log(jnp.array([1.0, 3.0]))
        >>> loss = [contrastive_energy_loss(e * value, value) for e in (-1.0, 0.0)]
        >>> [f"{x:.3f}" for x in loss]  # the entropy of (1/4, 3/4), then log 2
        ['0.562', '0.693']
    """
    weight = jax.nn.softmax(value, axis=-1)
    return -jnp.sum(weight * jax.nn.log_softmax(-energy, axis=-1), axis=-1)


def split_energy_loss(
    energy: Float[Array, "*batch action"],
    value: Float[Array, "*batch action"],
    *,
    max_weight: float = 100.0,
) -> Float[Array, "*batch"]:
    """As `contrastive_energy_loss`, exact for any number of actions.

    Each half of the actions is ranked by ``exp(βQ_i)`` over the mean of ``exp(βQ)`` in the
    *other* half. That normaliser is independent of what it weighs, so the loss is
    InfoNCE with positives from ``μ exp(βQ)/Z`` and negatives from ``μ``, whose optimum is
    the log-ratio of the two whatever their number.

    Args:
        energy: ``E_t`` of the noised actions.
        value: ``βQ`` of the clean ones.
        max_weight: bound of a weight, where the other half has no good action at all.

    Example:
        >>> value = jnp.array([[4.0, 0.0, 4.0, 0.0]])
        >>> right = split_energy_loss(-value, value)  # low energies where values are high
        >>> wrong = split_energy_loss(value, value)
        >>> bool(right[0] < wrong[0])
        True
    """
    half = value.shape[-1] // 2
    losses = []
    for own, other in (
        (slice(None, half), slice(half, None)),
        (slice(half, None), slice(None, half)),
    ):
        rest = value[..., other]
        level = jax.nn.logsumexp(rest, axis=-1, keepdims=True) - jnp.log(rest.shape[-1])
        weight = jnp.exp(jnp.minimum(value[..., own] - level, jnp.log(max_weight)))
        ranked = jax.nn.log_softmax(-energy[..., own], axis=-1)
        losses.append(-jnp.mean(weight * ranked, axis=-1))
    return 0.5 * (losses[0] + losses[1])


def regression_energy_loss(
    energy: Float[Array, "*batch action"], value: Float[Array, "*batch action"]
) -> Float[Array, "*batch"]:
    """Mean of ``(E_t + βQ)²``: learns ``E[βQ|a_t]``, a lower bound of ``-E_t``. Biased.

    The mean of the row's other actions is taken out of ``βQ``; it guides nowhere.

    Example:
        >>> value = jnp.array([[1.0, 3.0]])
        >>> regression_energy_loss(jnp.array([[2.0, -2.0]]), value).tolist()  # others: 3 and 1
        [0.0]
    """
    total = jnp.sum(value, axis=-1, keepdims=True)
    others = (total - value) / (value.shape[-1] - 1)
    return jnp.mean(jnp.square(energy + value - others), axis=-1)


LOSSES = {
    "contrastive": contrastive_energy_loss,
    "split": split_energy_loss,
    "regression": regression_energy_loss,
}


def support_value(
    value: Float[Array, "*batch action"], *, inverse_temperature: ArrayLike
) -> Float[Array, "*batch"]:
    """``Σ_i softmax_i(β Q_i) Q_i``: the value of the tilted policy on its support.

    Example:
        >>> float(support_value(jnp.array([1.0, 3.0]), inverse_temperature=0.0))
        2.0
    """
    weight = jax.nn.softmax(inverse_temperature * value, axis=-1)
    return jnp.sum(weight * value, axis=-1)
