"""Rolling policies in the simulator: returns for evaluation, rows for data sets.

Both go through `roll`, so what a data set records and what an evaluation scores is one
and the same loop. A policy is ``act(key, observation [env, obs] float32) -> action``;
the caller jits it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emfuse_jax.base import Environment, PolicyFn
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.tree import select

ActFn = Callable[[jax.Array, Any], Any]
MAX_STEPS = 1000
"""The time limit of D4RL's locomotion tasks."""


class EpisodeStats(NamedTuple):
    """Undiscounted return and number of steps of every episode."""

    returns: Float[Array | np.ndarray, "episodes"]
    lengths: Int[Array | np.ndarray, "episodes"]


class Step(NamedTuple):
    """One control step of all environments; every leaf is ``[env, …]``.

    ``qpos`` and ``qvel`` are the simulator's state before the step, which an
    observation does not determine (it clips velocities). Rows that are not ``live``
    mean nothing.
    """

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_observation: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    qpos: np.ndarray
    qvel: np.ndarray
    live: np.ndarray


def roll(
    key: jax.Array,
    env: MujocoBatch,
    act: ActFn,
    *,
    max_steps: int = MAX_STEPS,
    live: np.ndarray | None = None,
    restart: bool = True,
) -> Iterator[Step]:
    """Resets the environments and steps them until the caller stops, or all are done.

    Args:
        key: step ``i`` acts with ``fold_in(key, i)``.
        env: is reset first; its initial states follow its own seed.
        act: the policy.
        max_steps: the time limit of an episode.
        live: ``[env]``, the environments that take part; all by default.
        restart: whether an environment begins a new episode when one ends, or rests.

    Yields:
        Every step.

    Example:
        >>> import itertools
        >>> from emfuse_jax.data import random_act
        >>> from emfuse_jax.envs.mujoco_batch import MujocoBatch
        >>> steps = roll(jax.random.key(0), MujocoBatch("hopper", 2), random_act(3))
        >>> [step.reward.shape for step in itertools.islice(steps, 2)]
        [(2,), (2,)]
    """
    live = np.ones(env.num_envs, bool) if live is None else live.copy()
    observation = env.reset()
    age = np.zeros(env.num_envs, int)
    step = 0
    while live.any():
        # A NumPy scalar: a Python number would be a new constant to dispatch each step.
        step_key = jax.random.fold_in(key, np.uint32(step))
        action = np.asarray(act(step_key, observation.astype(np.float32)))
        qpos, qvel = env.positions()
        following, reward, terminated = env.step(action, live)
        terminated = terminated & live
        age += live
        truncated = live & ~terminated & (age >= max_steps)
        yield Step(
            observation=observation,
            action=action,
            reward=reward,
            next_observation=following,
            terminated=terminated,
            truncated=truncated,
            qpos=qpos,
            qvel=qvel,
            live=live.copy(),
        )
        done = terminated | truncated
        observation = following
        if restart and done.any():
            age[done] = 0
            observation = env.reset(done)
        elif not restart:
            live &= ~done
        step += 1


def evaluate(
    key: jax.Array,
    env: MujocoBatch,
    act: ActFn,
    num_episodes: int,
    *,
    max_steps: int = MAX_STEPS,
) -> EpisodeStats:
    """Returns of ``num_episodes`` episodes; the result depends on nothing but the
    inputs.

    Each environment plays one episode per wave, so that short episodes are not counted
    more often than long ones.

    Args:
        key: seeds the initial states and the policy.
        env: its generator is reseeded from ``key``.
        act: the policy; it always sees all ``env.num_envs`` rows.
        num_episodes: how many.
        max_steps: the time limit.

    Raises:
        ValueError: if a count is not positive, or the policy's actions are not finite.

    Example:
        >>> from emfuse_jax.data import random_act
        >>> from emfuse_jax.envs.mujoco_batch import MujocoBatch
        >>> env = MujocoBatch("hopper", 2)
        >>> stats = evaluate(jax.random.key(0), env, random_act(3), 4, max_steps=20)
        >>> stats.returns.shape, int(stats.lengths.max()) <= 20
        ((4,), True)
    """
    if num_episodes < 1 or max_steps < 1:
        raise ValueError(
            f"num_episodes={num_episodes} and max_steps={max_steps} must be at least 1"
        )
    key_seed, key_act = jax.random.split(key)
    env.seed(_seed(key_seed))
    returns, lengths = [], []
    for wave in range(math.ceil(num_episodes / env.num_envs)):
        live = np.arange(env.num_envs) < num_episodes - wave * env.num_envs
        total, length = np.zeros(env.num_envs), np.zeros(env.num_envs, int)
        wave_key = jax.random.fold_in(key_act, np.uint32(wave))
        for step in roll(
            wave_key, env, act, max_steps=max_steps, live=live, restart=False
        ):
            total += np.where(step.live, step.reward, 0.0)
            length += step.live
        returns.append(total[live])
        lengths.append(length[live])
    return EpisodeStats(np.concatenate(returns), np.concatenate(lengths))


def collect(
    key: jax.Array,
    env: MujocoBatch,
    act: ActFn,
    num_steps: int,
    *,
    max_steps: int = MAX_STEPS,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Records a policy's steps in D4RL's layout, one environment's stream after
    another.

    The last step of each stream counts as a timeout, so up to ``env.num_envs`` episodes
    are cut short.

    Args:
        key: seeds the initial states and the policy.
        env: its generator is reseeded from ``key``.
        act: the policy.
        num_steps: rows in all, at least one per environment.
        max_steps: the time limit.
        on_step: called with the number of rows that each step added (a progress bar).

    Returns:
        observations, actions, rewards, next_observations (float32), terminals, timeouts
        (bool), qpos and qvel before the step (float64), each ``[num_steps, …]``.

    Raises:
        ValueError: if there are fewer steps than environments.

    Example:
        >>> from emfuse_jax.data import random_act
        >>> from emfuse_jax.envs.mujoco_batch import MujocoBatch
        >>> rows = collect(jax.random.key(0), MujocoBatch("hopper", 2), random_act(3), 20)
        >>> rows["observations"].shape, int(rows["timeouts"].sum() + rows["terminals"].sum()) >= 2
        ((20, 11), True)
    """
    if num_steps < env.num_envs or max_steps < 1:
        raise ValueError(
            f"num_steps={num_steps} must be at least num_envs={env.num_envs} and "
            f"max_steps={max_steps} at least 1"
        )
    key_seed, key_act = jax.random.split(key)
    env.seed(_seed(key_seed))
    shares = np.full(env.num_envs, num_steps // env.num_envs)
    shares[: num_steps % env.num_envs] += 1
    steps: list[Step] = []
    for step in roll(key_act, env, act, max_steps=max_steps):
        steps.append(step)
        if on_step is not None:
            on_step(int(np.sum(shares >= len(steps))))
        if len(steps) == shares[0]:
            break
    return _layout(steps, shares)


def _layout(steps: list[Step], shares: np.ndarray) -> dict[str, np.ndarray]:
    def join(name: str, dtype: Any) -> np.ndarray:
        stacked = np.stack([getattr(step, name) for step in steps]).astype(dtype)
        return np.concatenate([stacked[:n, i] for i, n in enumerate(shares)])

    arrays = {
        "observations": join("observation", np.float32),
        "actions": join("action", np.float32),
        "rewards": join("reward", np.float32),
        "next_observations": join("next_observation", np.float32),
        "terminals": join("terminated", bool),
        "timeouts": join("truncated", bool),
        "qpos": join("qpos", np.float64),
        "qvel": join("qvel", np.float64),
    }
    last = np.cumsum(shares) - 1
    arrays["timeouts"][last] |= ~arrays["terminals"][last]
    return arrays


def _seed(key: jax.Array) -> int:
    return int(jax.random.bits(key, dtype=jnp.uint32))


def evaluate_jittable(
    key: jax.Array,
    environment: Environment,
    policy: PolicyFn,
    num_episodes: int,
    *,
    max_steps: int = MAX_STEPS,
) -> EpisodeStats:
    """`evaluate` for an `Environment`: pure JAX, so jit it, vmap it over seeds.

    Args:
        key: consumed.
        environment: its own auto-reset is harmless, only first episodes count.
        policy: the policy.
        num_episodes: episodes, run side by side.
        max_steps: the time limit, on top of the environment's own.

    Example:
        >>> from emfuse_jax.envs.toy import constant_reward
        >>> stats = jax.jit(
        ...     lambda key: evaluate_jittable(
        ...         key, constant_reward(), lambda key, state: jnp.zeros((4, 1)), 4, max_steps=3
        ...     )
        ... )(jax.random.key(0))
        >>> stats.returns.tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    key_reset, key_steps = jax.random.split(key)
    reset_keys = jax.random.split(key_reset, num_episodes)
    states, _ = jax.vmap(environment.reset)(reset_keys)
    zeros = jnp.zeros(num_episodes)
    initial = (states, jnp.ones(num_episodes, bool), zeros, zeros.astype(jnp.int32))

    def body(carry: Any, step: jax.Array) -> tuple[Any, None]:
        state, live, returns, lengths = carry
        key_act, key_env = jax.random.split(jax.random.fold_in(key_steps, step))
        action = policy(key_act, jax.vmap(environment.observe)(state))
        keys = jax.random.split(key_env, num_episodes)
        following, transition = jax.vmap(environment.step)(keys, state, action)
        returns = returns + jnp.where(live, transition.reward, 0.0)
        lengths = lengths + live
        done = transition.terminated | transition.truncated
        return (select(live, following, state), live & ~done, returns, lengths), None

    carry, _ = jax.lax.scan(body, initial, jnp.arange(max_steps))
    return EpisodeStats(carry[2], carry[3])
