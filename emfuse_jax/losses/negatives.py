"""Where negatives come from: a box, a chain on the model, a proposal of known density.

No gradient flows into a negative from here, neither to where it came from nor to the
parameters of the chain that made it.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from emfuse_jax.base import Key, Sampler
from emfuse_jax.loops import run_sampler

__all__ = [
    "chain_negatives",
    "gaussian_mixture_log_prob",
    "gaussian_mixture_proposal",
    "uniform_negatives",
]

Box: TypeAlias = tuple[ArrayLike, ArrayLike]
"""``(low, high)``, each a number, ``[dim]`` or ``[*batch, dim]``."""


def uniform_negatives(
    key: Key, shape: tuple[int, ...], low: ArrayLike = -1.0, high: ArrayLike = 1.0
) -> Float[Array, "..."]:
    """Uniform draws from a box.

    Args:
        key: consumed.
        shape: ``(*batch, negative, dim)``.
        low: smallest values, broadcast to ``shape``.
        high: largest values.

    Example:
        >>> uniform_negatives(jax.random.key(0), (5, 16, 3)).shape
        (5, 16, 3)
    """
    dtype = jnp.result_type(low, high, jnp.float32)
    return jax.random.uniform(key, shape, dtype, minval=low, maxval=high)


def chain_negatives(
    key: Key, sampler: Sampler, initial: Float[Array, "*shape"], num_steps: int
) -> Float[Array, "*shape"]:
    """The ends of chains started at ``initial``, gradients stopped.

    Args:
        key: consumed.
        sampler: any `Sampler` whose state has a ``position``. Parameters that its energy
            closes over get no gradient through the chain, and none is prepared.
        initial: where the chains start, ``[*batch, negative, dim]``.
        num_steps: steps of each chain.

    Example:
        >>> from emfuse_jax.samplers import etm_langevin
        >>> sampler = etm_langevin(lambda y: jnp.sum(y**2, axis=-1), 10)
        >>> key = jax.random.key(0)
        >>> chain_negatives(key, sampler, jnp.zeros((5, 16, 3)), 10).shape
        (5, 16, 3)
    """

    def run(start: jax.Array) -> jax.Array:
        return run_sampler(key, sampler, start, num_steps)[0].position

    # A stop on the result alone would leave the chain's whole linearisation in the
    # program; parameters that `sampler` closed over are stopped before it runs.
    initial = jax.lax.stop_gradient(initial)
    converted, closed_over = jax.closure_convert(run, initial)
    return jax.lax.stop_gradient(
        converted(initial, *jax.lax.stop_gradient(closed_over))
    )


def gaussian_mixture_proposal(
    key: Key,
    mean: Float[Array, "*batch dim"],
    std: Float[Array, "*batch dim"],
    scales: Sequence[float] | Float[Array, "scale"],
    num: int,
    *,
    box: Box | None = None,
    box_weight: float = 0.1,
) -> tuple[Float[Array, "*batch {num} dim"], Float[Array, "*batch {num}"]]:
    """Draws from a scale mixture of a diagonal Gaussian, and their log-density.

    ``q = (1 - w) · mean_c N(mean, diag (scale_c std)²) + w · U(box)``: heavy tails, so that
    negatives are hard and yet cover the data, with a density that `ranking_nce` needs.

    Args:
        key: consumed.
        mean: of the Gaussian, for instance a regression head's.
        std: of the Gaussian, positive.
        scales: factors of ``std``, one equally likely component each.
        num: draws per row.
        box: ``(low, high)`` of a uniform component, if any.
        box_weight: its probability ``w``.

    Returns:
        The draws ``[*batch, num, dim]`` and ``log q`` ``[*batch, num]``.

    Raises:
        ValueError: if there is no scale or one that is not positive, or ``box_weight`` is
            not between 0 and 1.

    Example:
        >>> mean, std = jnp.zeros((5, 2)), jnp.ones((5, 2))
        >>> draws, log_q = gaussian_mixture_proposal(
        ...     jax.random.key(0), mean, std, (1.0, 3.0), 8
        ... )
        >>> draws.shape, log_q.shape
        ((5, 8, 2), (5, 8))
    """
    mean, std = jax.lax.stop_gradient((mean, std))
    scales = _check_mixture(scales, box, box_weight, mean.dtype)
    key_scale, key_noise, key_member, key_box = jax.random.split(key, 4)
    shape = (*mean.shape[:-1], num, mean.shape[-1])
    index = jax.random.randint(key_scale, shape[:-1], 0, len(scales))
    noise = scales[index][..., None] * jax.random.normal(key_noise, shape, mean.dtype)
    draws = mean[..., None, :] + std[..., None, :] * noise
    if box is not None:
        low, high = (_spread(bound, draws) for bound in box)
        uniform = low + (high - low) * jax.random.uniform(key_box, shape, mean.dtype)
        member = jax.random.bernoulli(key_member, box_weight, shape[:-1])
        draws = jnp.where(member[..., None], uniform, draws)
    log_prob = gaussian_mixture_log_prob(
        draws, mean, std, scales, box=box, box_weight=box_weight
    )
    return draws, log_prob


def gaussian_mixture_log_prob(
    targets: Float[Array, "*shape dim"],
    mean: Float[Array, "*batch dim"],
    std: Float[Array, "*batch dim"],
    scales: Sequence[float] | Float[Array, "scale"],
    *,
    box: Box | None = None,
    box_weight: float = 0.1,
) -> Float[Array, "*shape"]:
    """``log q`` of `gaussian_mixture_proposal`, at positives as well as at draws.

    Args:
        targets: ``[*batch, dim]``, or ``[*batch, num, dim]``.
        mean: of the Gaussian.
        std: of the Gaussian, positive.
        scales: factors of ``std``, one equally likely component each.
        box: ``(low, high)`` of a uniform component, if any.
        box_weight: its probability.

    Raises:
        ValueError: as `gaussian_mixture_proposal`.

    Example:
        >>> one = jnp.ones(1)
        >>> print(f"{gaussian_mixture_log_prob(0 * one, 0 * one, one, (1.0,)):.4f}")
        -0.9189
    """
    scales = _check_mixture(scales, box, box_weight, targets.dtype)
    std = _spread(std, targets)
    standard = (targets - _spread(mean, targets)) / std
    distance = jnp.sum(jnp.square(standard), axis=-1)[..., None]
    log_norm = jnp.sum(jnp.log(std) + 0.5 * jnp.log(2 * jnp.pi), axis=-1)
    scales = scales.reshape((1,) * (targets.ndim - 1) + (-1,))
    log_scale = targets.shape[-1] * jnp.log(scales)
    components = -0.5 * distance / jnp.square(scales) - log_scale
    log_mean = jax.nn.logsumexp(components, axis=-1) - jnp.log(float(scales.size))
    log_prob = log_mean - log_norm
    if box is None:
        return log_prob
    low, high = (_spread(bound, targets) for bound in box)
    inside = jnp.all((targets >= low) & (targets <= high), axis=-1)
    log_uniform = -jnp.sum(jnp.log(high - low), axis=-1) + jnp.log(box_weight)
    log_gaussian = log_prob + jnp.log1p(-box_weight)
    # Outside the box the other branch is never used, so that its gradient stays finite.
    return jnp.where(inside, jnp.logaddexp(log_gaussian, log_uniform), log_gaussian)


def _spread(x: ArrayLike, targets: jax.Array) -> jax.Array:
    """``[*batch, dim]`` next to targets ``[*batch, num, dim]``."""
    x = jnp.asarray(x, targets.dtype)
    if x.ndim == targets.ndim - 1 and x.ndim > 0:
        x = x[..., None, :]
    return jnp.broadcast_to(x, targets.shape)


def _check_mixture(
    scales: Sequence[float] | jax.Array, box: Box | None, box_weight: float, dtype: Any
) -> jax.Array:
    if len(scales) == 0:
        raise ValueError("scales is empty; expected at least one factor, such as 1.0")
    if not isinstance(scales, jax.Array) and not all(scale > 0 for scale in scales):
        raise ValueError(f"scales={tuple(scales)}; expected positive factors of std")
    if box is not None and not 0 < box_weight < 1:
        raise ValueError(
            f"box_weight={box_weight}; expected between 0 and 1, or box=None for no box"
        )
    return jnp.asarray(scales, dtype)
