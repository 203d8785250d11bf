"""Tasks of one observation and one action whose right answers are known."""

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import Transition

MODE = 0.4
"""Half the distance of the two modes; an action counts as in one within a quarter of it."""


def transitions(observation: jax.Array, action: jax.Array) -> Transition:
    """Recorded pairs; the rest is not read."""
    nothing = jnp.zeros(len(observation))
    false = nothing.astype(bool)
    return Transition(observation, action, nothing, observation, false, false)


def regression(key: jax.Array, rows: int) -> Transition:
    """``a = sin 3x``, x uniform in [-1, 1]."""
    x = jax.random.uniform(key, (rows, 1), minval=-1.0)
    return transitions(x, jnp.sin(3 * x))


def two_modes(key: jax.Array, rows: int) -> Transition:
    """``½ sin 3x ± 0.4``, either with the same probability."""
    key_x, key_mode = jax.random.split(key)
    x = jax.random.uniform(key_x, (rows, 1), minval=-1.0)
    side = jnp.where(jax.random.bernoulli(key_mode, 0.5, (rows, 1)), MODE, -MODE)
    return transitions(x, 0.5 * jnp.sin(3 * x) + side)


def per_seed(rows: jax.Array) -> list[float]:
    """Means over all but the first axis."""
    return np.asarray(rows, np.float64).reshape(len(rows), -1).mean(axis=1).tolist()


def auc(low: jax.Array, high: jax.Array) -> float:
    """Probability that a row of ``low`` is below one of ``high``, whichever they are."""
    order = np.sort(np.asarray(high))
    above = len(order) - np.searchsorted(order, np.asarray(low), side="right")
    return float(np.mean(above) / len(order))
