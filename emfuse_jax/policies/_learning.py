"""Steps, rates and averages that the learners of policies share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emfuse_jax.base import Params


def decayed_adam(
    learning_rate: float, decay_steps: int | None = None
) -> optax.GradientTransformation:
    """Adam, its rate annealed to 0 along a cosine unless ``decay_steps`` is None."""
    rate: Any = learning_rate
    if decay_steps is not None:
        rate = optax.cosine_decay_schedule(rate, decay_steps)
    return optax.adam(rate)


def gradient_step(
    optimizer: optax.GradientTransformation,
    objective: Callable[[Params], tuple[jax.Array, Any]],
    weights: Params,
    state: optax.OptState,
) -> tuple[Params, optax.OptState, jax.Array, Any]:
    """One step down ``objective(weights) -> (loss, what else it found)``.

    Returns:
        New weights, the optimiser's new state, the loss, and what else was found.
    """
    (loss, found), gradient = jax.value_and_grad(objective, has_aux=True)(weights)
    change, state = optimizer.update(gradient, state, weights)
    return optax.apply_updates(weights, change), state, loss, found


def moving_average(
    weights: Params, average: Params, step: jax.Array, rate: float
) -> Params:
    """The mean of all weights so far, until that would forget slower than ``rate``."""
    return optax.incremental_update(weights, average, _share(step, rate))


def running_mean(
    average: jax.Array, value: jax.Array, step: jax.Array, rate: float
) -> jax.Array:
    """`moving_average` of arrays, each entry with its own ``step`` if that is an array."""
    return average + _share(step, rate) * (value - average)


def _share(step: jax.Array, rate: float) -> Any:
    return jnp.maximum(rate, 1.0 / (step + 1.0))
