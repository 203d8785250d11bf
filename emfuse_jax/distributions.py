"""The policy distribution: a diagonal normal squashed by tanh, built from distrax.

distrax is imported when a function is called: it costs more than a second. It returns
arrays, never distribution objects, because those do not survive ``vmap`` with the right
batch shape.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTION_LIMIT = 1.0 - 1e-6
"""Recorded actions are clipped to ± this: the log-density at ±1 is not finite."""


def _tanh_normal(mean: Float[Array, "*batch act"], log_std: Float[Array, "*batch act"]):
    """``tanh(u)``, ``u ~ N(mean, diag exp(log_std)²)``, as a distrax distribution."""
    import distrax

    normal = distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))
    return distrax.Transformed(normal, distrax.Block(distrax.Tanh(), 1))


def sample_and_log_prob(
    key: jax.Array,
    mean: Float[Array, "*batch act"],
    log_std: Float[Array, "*batch act"],
) -> tuple[Float[Array, "*batch act"], Float[Array, "*batch"]]:
    """A reparameterised action and its log-density, computed from the pre-image.

    Inverting the tanh instead would give NaN: in float32 an action saturates to exactly
    1 from ``u ≈ 9`` on.

    Args:
        key: consumed.
        mean: of the pre-image.
        log_std: log standard deviation of the pre-image.

    Example:
        >>> action, log_prob = sample_and_log_prob(
        ...     jax.random.key(0), jnp.full((4, 2), 20.0), jnp.zeros((4, 2)))
        >>> bool(jnp.all(jnp.isfinite(log_prob)))
        True
    """
    # distrax draws with a leading axis of one and adds it to the mean.
    with jax.numpy_rank_promotion("allow"):
        action, log_prob = _tanh_normal(mean, log_std).sample_and_log_prob(seed=key)
    return jnp.asarray(action), jnp.asarray(log_prob)


def log_prob(
    mean: Float[Array, "*batch act"],
    log_std: Float[Array, "*batch act"],
    action: Float[Array, "*batch act"],
) -> Float[Array, "*batch"]:
    """Log-density of a recorded action, clipped to ±`ACTION_LIMIT` first.

    Example:
        >>> density = jax.jit(log_prob)(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1))
        >>> round(float(density), 3)  # tanh has slope 1 there: the normal's own -½ log 2π
        -0.919
    """
    action = jnp.clip(action, -ACTION_LIMIT, ACTION_LIMIT)
    with jax.numpy_rank_promotion("allow"):
        return jnp.asarray(_tanh_normal(mean, log_std).log_prob(action))


def mode(mean: Float[Array, "*batch act"]) -> Float[Array, "*batch act"]:
    """``tanh(mean)``, the deterministic action (the median, not the density's peak).

    Example:
        >>> mode(jnp.array([0.0, 100.0])).tolist()
        [0.0, 1.0]
    """
    return jnp.tanh(mean)
