"""The energy law: ``p(y) ∝ exp(-E(y) / T)``, so that low energy means likely.

An energy is a negative log-probability up to a constant. Infinite energy marks an
impossible event; everything here stays free of NaN around it, in value and in gradient.
Where *no* event is possible there is no distribution: the log-partition and every
log-probability are then ``-inf`` with gradient 0.

References:
    LeCun, Chopra, Hadsell, Ranzato, Huang, "A Tutorial on Energy-Based Learning", 2006,
    section 1.3. http://yann.lecun.com/exdb/publis/pdf/lecun-06.pdf
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

__all__ = ["boltzmann_log_prob", "energy_from_logits", "log_partition"]


def boltzmann_log_prob(
    energy: Float[Array, "*shape"],
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
) -> Float[Array, "*shape"]:
    """Log-probabilities of events with these energies: ``-E/T - log Σ exp(-E/T)``.

    Args:
        energy: one energy per event along ``axis``; ``+inf`` is an impossible event.
        temperature: positive, a scalar.
        axis: the axis of the events.
        where: true where an event exists; the others count as impossible.

    Example:
        >>> log_prob = boltzmann_log_prob(jnp.array([0.0, 0.0, jnp.inf]))
        >>> jnp.exp(log_prob).round(3).tolist()
        [0.5, 0.5, 0.0]
    """
    logits = _logits(energy, temperature, where)
    log_z = jnp.expand_dims(_log_sum(logits, axis), axis)
    return jnp.where(log_z == -jnp.inf, -jnp.inf, logits - _finite(log_z))


def log_partition(
    energy: Float[Array, "*shape"],
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: Bool[Array, "*#shape"] | None = None,
) -> Float[Array, "..."]:
    """``log Z = log Σ exp(-E/T)`` over the events along ``axis``, which is dropped.

    Example:
        >>> float(log_partition(jnp.zeros(4)).round(3)) == float(jnp.log(4.0).round(3))
        True
    """
    return _log_sum(_logits(energy, temperature, where), axis)


def energy_from_logits(
    logits: Float[Array, "*batch event"], *, temperature: ArrayLike = 1.0
) -> Float[Array, "*batch event"]:
    """Energies of a softmax: ``-log softmax(logits / T)``.

    Normalised (their log-partition is 0), so that the energies of several models with
    different logit offsets can be compared and pooled.

    Example:
        >>> energy = energy_from_logits(jnp.array([1.0, 2.0, 3.0]))
        >>> bool(jnp.abs(log_partition(energy)) < 1e-6)
        True
    """
    return -boltzmann_log_prob(-logits, temperature=temperature)


def _logits(
    energy: jax.Array, temperature: ArrayLike, where: jax.Array | None
) -> jax.Array:
    # The infinity is replaced before the division: its derivative with respect to the
    # temperature would be 0 · inf.
    absent = energy == jnp.inf
    if where is not None:
        absent = absent | ~where
    return jnp.where(absent, -jnp.inf, -jnp.where(absent, 0.0, energy) / temperature)


def _log_sum(logits: jax.Array, axis: int) -> jax.Array:
    # logsumexp of nothing but -inf has a NaN gradient.
    nothing = jnp.all(logits == -jnp.inf, axis=axis, keepdims=True)
    total = jax.nn.logsumexp(jnp.where(nothing, 0.0, logits), axis=axis)
    return jnp.where(jnp.squeeze(nothing, axis), -jnp.inf, total)


def _finite(log_z: jax.Array) -> jax.Array:
    return jnp.where(log_z == -jnp.inf, 0.0, log_z)
