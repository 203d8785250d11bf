"""The losses of soft actor-critic, per row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def critic_target(
    reward: Float[Array, "*batch"],
    terminated: Bool[Array, "*batch"],
    next_q: Float[Array, "model *next"],
    next_log_prob: Float[Array, "*next"],
    *,
    temperature: float | jax.Array,
    discount: float,
    dispersion: float | None = None,
) -> Float[Array, "*batch"]:
    """``r + γ (1 − terminated) (min_i Q_i(s', a') − α log π(a'|s'))``, eqs. 2 and 3.

    A time limit is no termination: pass ``terminated``, never "done". Temperature 0
    leaves the entropy out of the backup.

    With ``dispersion`` λ, ``next_q`` and ``next_log_prob`` have an axis of candidates for
    the next observation in front of the batch, and the value is ``mean_i V_i - λ std_i
    V_i`` over them (Fang et al., arXiv:2602.02900; the penalty of MOBILE, ICML 2023).

    Example:
        >>> q, log_prob = jnp.array([[4.0], [3.0]]), jnp.array([-1.0])
        >>> target = critic_target(jnp.array([1.0]), jnp.array([False]), q, log_prob,
        ...                        temperature=0.5, discount=0.9)
        >>> round(float(target[0]), 3)
        4.15
    """
    next_value = jnp.min(next_q, axis=0) - temperature * next_log_prob
    if dispersion is not None:
        spread = jnp.std(next_value, axis=0)
        next_value = jnp.mean(next_value, axis=0) - dispersion * spread
    return reward + discount * jnp.where(terminated, 0.0, next_value)


def critic_loss(
    q: Float[Array, "model *batch"], target: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """``Σ_i (Q_i − y)²``: every critic regresses on the same target, without the ½.

    Example:
        >>> critic_loss(jnp.array([[1.0], [3.0]]), jnp.array([2.0])).tolist()
        [2.0]
    """
    return jnp.sum(jnp.square(q - jax.lax.stop_gradient(target)[None]), axis=0)


def actor_loss(
    q: Float[Array, "model *batch"],
    log_prob: Float[Array, "*batch"],
    *,
    temperature: float | jax.Array,
) -> Float[Array, "*batch"]:
    """``α log π(a|s) − min_i Q_i(s, a)`` for a reparameterised ``a`` (equation 7).

    Example:
        >>> q = jnp.array([[1.0], [3.0]])  # [model, batch]: the more pessimistic counts
        >>> actor_loss(q, jnp.array([2.0]), temperature=0.5).tolist()
        [0.0]
    """
    return jax.lax.stop_gradient(temperature) * log_prob - jnp.min(q, axis=0)


def temperature_loss(
    log_temperature: Float[Array, ""],
    log_prob: Float[Array, "*batch"],
    *,
    target_entropy: float,
) -> Float[Array, "*batch"]:
    """``−log α (log π + H)``; its gradient is zero where the entropy equals ``H``.

    This is equation 18 with α replaced by log α, as every published implementation
    does: the fixed point is the same and steps do not shrink with α.

    Example:
        >>> gradient = jax.grad(
        ...     lambda x: temperature_loss(x, jnp.array([1.0]), target_entropy=-1.0).sum()
        ... )
        >>> abs(float(gradient(jnp.array(0.0))))  # an entropy of -1 is the target
        0.0
    """
    return -log_temperature * jax.lax.stop_gradient(log_prob + target_entropy)
