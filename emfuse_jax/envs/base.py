"""Auto-reset, time limits and episode statistics around any `base.Environment`.

The transition that a step returns is the true one: its ``next_observation`` is what the
dynamics produced, also where an episode ends and the environment starts anew, and a
time limit sets ``truncated``, never ``terminated``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from emfuse_jax import tree
from emfuse_jax.base import Environment, Transition


class EpisodeStatistics(NamedTuple):
    """The running episode, and the last one that ended (0 before the first)."""

    episode_return: Float[Array, "*batch"]
    episode_length: Int[Array, "*batch"]
    last_return: Float[Array, "*batch"]
    last_length: Int[Array, "*batch"]
    num_episodes: Int[Array, "*batch"]


class AutoResetState(NamedTuple):
    """State of an environment wrapped by `auto_reset`."""

    inner: Any
    statistics: EpisodeStatistics


def auto_reset(env: Environment, *, max_steps: int | None = None) -> Environment:
    """Starts a new episode as soon as one ends, and counts.

    Both a step and a reset are computed each time (a ``select`` between them is what a
    condition becomes under ``vmap``), so a reset should not cost much more than a step.

    Args:
        env: the environment; its own ``truncated`` is kept.
        max_steps: time limit in steps; None adds none.

    Returns:
        An `Environment` whose state is an `AutoResetState`.

    Raises:
        ValueError: if ``max_steps`` is below 1.

    Example:
        >>> from emfuse_jax.envs.toy import endless_reward
        >>> env = auto_reset(endless_reward(), max_steps=2)
        >>> @jax.jit
        ... def play(key):
        ...     def step(state, key):
        ...         state, transition = env.step(key, state, jnp.zeros(1))
        ...         return state, transition.truncated
        ...
        ...     keys = jax.random.split(key, 6)
        ...     return jax.lax.scan(step, env.reset(keys[0])[0], keys[1:])[1]
        >>> play(jax.random.key(0)).tolist()
        [False, True, False, True, False]
    """
    if max_steps is not None and max_steps < 1:
        raise ValueError(
            f"max_steps={max_steps}; expected at least 1, or None for no limit"
        )

    def reset(key: jax.Array) -> tuple[AutoResetState, jax.Array]:
        inner, observation = env.reset(key)
        zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
        return AutoResetState(
            inner, EpisodeStatistics(zero, none, zero, none, none)
        ), observation

    def step(
        key: jax.Array, state: AutoResetState, action: jax.Array
    ) -> tuple[AutoResetState, Transition]:
        key_step, key_reset = jax.random.split(key)
        inner, transition = env.step(key_step, state.inner, action)
        if max_steps is not None:
            late = state.statistics.episode_length + 1 >= max_steps
            transition = transition._replace(
                truncated=(transition.truncated | late) & ~transition.terminated
            )
        done = transition.terminated | transition.truncated
        fresh, _ = env.reset(key_reset)
        statistics = _count(state.statistics, transition.reward, done)
        return AutoResetState(tree.select(done, fresh, inner), statistics), transition

    def observe(state: AutoResetState) -> jax.Array:
        return env.observe(state.inner)

    return Environment(reset=reset, step=step, observe=observe, spec=env.spec)


def _count(
    statistics: EpisodeStatistics, reward: jax.Array, done: jax.Array
) -> EpisodeStatistics:
    episode_return = statistics.episode_return + reward
    length = statistics.episode_length + 1
    return EpisodeStatistics(
        episode_return=jnp.where(done, 0.0, episode_return),
        episode_length=jnp.where(done, 0, length),
        last_return=jnp.where(done, episode_return, statistics.last_return),
        last_length=jnp.where(done, length, statistics.last_length),
        num_episodes=statistics.num_episodes + done.astype(jnp.int32),
    )
