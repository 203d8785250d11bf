"""The descent of the energy-based transformer policy, and the loss at where it leads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.base import EnergyFn, Metrics, Sampler
from emfuse_jax.loops import run_sampler
from emfuse_jax.policies._ebt_config import EbtConfig
from emfuse_jax.samplers.descent import DescentState, descent
from emfuse_jax.tree import select

__all__ = ["descent_loss", "policy_descent"]


def descent_loss(
    key: jax.Array,
    energy_fn: EnergyFn,
    action: Float[Array, "*batch act"],
    config: EbtConfig,
) -> tuple[Float[Array, "*batch"], Metrics]:
    """Squared error of the positions of a training descent, mean over coordinates.

    Args:
        key: draws start, number of steps, step sizes and noise.
        energy_fn: of the batch's observations.
        action: the recorded ones, where the descent should end.
        config: see `EbtConfig`.

    Returns:
        The loss of each row, and means over rows: ``energy`` of the recorded action,
        ``energy_drop`` from the first step's to the last's, ``rise_rate``, the share of
        rows whose energy rose (steps too long), and ``gradient_norm`` of the last step.
    """
    key_start, key_count, key_size, key_noise = jax.random.split(key, 4)
    batch = action.shape[:-1]
    start = _training_start(key_start, energy_fn, action, config)
    count = config.train_steps
    if config.extra_steps:
        count += jax.random.randint(key_count, (), 0, config.extra_steps + 1)
    size: Any = config.step_size
    if config.step_size_spread > 1.0:
        spread = config.step_size_spread
        low, high = config.step_size / spread, config.step_size * spread
        size = jax.random.uniform(key_size, batch, minval=low, maxval=high)
    sampler = policy_descent(config, energy_fn, size, action.shape[-1], count)
    if config.extra_steps:
        sampler = _until(count, sampler, action)
    most = config.train_steps + config.extra_steps
    _, (position, info) = run_sampler(
        key_noise, sampler, start, most, keep=lambda state, info: (state.position, info)
    )
    step = jnp.arange(most).reshape((most,) + (1,) * len(batch))
    scored = step == count - 1 if config.truncate else step < count
    error = jnp.mean(jnp.square(position - action[None]), axis=-1)
    weight = jnp.where(scored, 1.0 if config.truncate else 1.0 / count, 0.0)
    loss = jnp.sum(jnp.where(scored, weight * error, 0.0), axis=0)
    last = energy_fn(position[count - 1])
    metrics = {
        "energy": jnp.mean(energy_fn(action)),
        "energy_drop": jnp.mean(info.energy[0] - last),
        "rise_rate": jnp.mean(last > info.energy[0]),
        "gradient_norm": jnp.mean(info.gradient_norm[count - 1]),
    }
    return loss, jax.lax.stop_gradient(metrics)


def _until(count: Any, sampler: Sampler, safe: jax.Array) -> Sampler:
    """The sampler at rest from step ``count`` on, where it steps from ``safe`` for show: a
    step beyond what is scored may overflow, and 0 times its derivative is NaN."""

    def step(key: jax.Array, state: DescentState) -> tuple[DescentState, Any]:
        live = state.step < count
        start = select(live, state, sampler.init(safe)._replace(step=state.step))
        moved, info = sampler.step(key, start)
        return select(live, moved, state)._replace(step=moved.step), info

    return Sampler(sampler.init, step)


def _training_start(
    key: jax.Array, energy_fn: EnergyFn, action: jax.Array, config: EbtConfig
) -> Float[Array, "*batch act"]:
    """Of ``num_starts`` draws, the one whose descent ends nearest to the recorded action.

    The draws compete by their ends, at the nominal step size and without noise; no
    derivative is taken of that.
    """
    key_noise, key_level, key_descent = jax.random.split(key, 3)
    noise = jax.random.normal(key_noise, (config.num_starts, *action.shape))
    low, high = config.start_noise
    if low < 1.0:
        shape = (*noise.shape[:-1], 1)
        level = jax.random.uniform(key_level, shape, minval=low, maxval=high)
        noise = jnp.sqrt(1.0 - jnp.square(level)) * action[None] + level * noise
    if config.num_starts == 1:
        return noise[0]
    sampler = policy_descent(config, energy_fn, config.step_size, action.shape[-1])

    def end(start: jax.Array) -> jax.Array:
        return run_sampler(key_descent, sampler, start, config.train_steps)[0].position

    error = jnp.sum(jnp.square(jax.vmap(end)(noise) - action[None]), axis=-1)
    best = jnp.argmin(jax.lax.stop_gradient(error), axis=0)
    return jnp.take_along_axis(noise, best[None, ..., None], axis=0)[0]


def policy_descent(
    config: EbtConfig,
    energy_fn: EnergyFn,
    step_size: Any,
    action_size: int,
    count: Any = None,
) -> Sampler:
    """The one descent of training (``count`` steps, noisy) and of acting (None)."""
    schedule = None
    if count is not None and max(config.noise) > 0:
        first, last = config.noise
        schedule = functools.partial(_cosine, first=first, last=last, count=count)
    return descent(
        energy_fn,
        step_size * action_size,
        momentum=config.momentum,
        noise_schedule=schedule,
        normalize=config.normalize,
        energy_scaled=config.energy_scaled,
        detach=config.detach and count is not None,
    )


def _cosine(step: jax.Array, *, first: float, last: float, count: Any) -> jax.Array:
    share = jnp.minimum(step / count, 1.0)
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * share))
