"""Brax environments as `base.Environment`, for rollouts inside a compiled program.

Brax's ``done`` is a termination; time limits belong to `envs.base.auto_reset`, so brax's
own wrappers (which need old-style keys) are not used. Its ``mjx`` backend follows MuJoCo;
``generalized``, ``positional`` and ``spring`` are other physics, and scores in them
cannot be compared with MuJoCo's.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from emfuse_jax.base import Environment, SpaceSpec, Transition

BACKENDS = ("generalized", "mjx", "positional", "spring")


def brax_environment(
    name: str, *, backend: str = "generalized", **options: Any
) -> Environment:
    """A brax environment without its wrappers.

    Args:
        name: as in ``brax.envs``, such as ``"inverted_pendulum"``.
        backend: one of `BACKENDS`.
        **options: passed on to the environment.

    Returns:
        An `Environment` whose state is brax's.

    Raises:
        ImportError: if brax is not installed.
        ValueError: for an unknown name or backend; lists those that are known.

    Example:
        >>> brax_environment("inverted_pendulum").spec  # doctest: +SKIP
        SpaceSpec(observation_size=4, action_size=1)
    """
    try:
        envs = importlib.import_module("brax.envs")
    except ImportError as error:
        raise ImportError("brax environments need brax; pip install brax") from error
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; known: {', '.join(BACKENDS)}")
    known = sorted(envs._envs)
    if name not in known:
        raise ValueError(
            f"unknown brax environment {name!r}; known: {', '.join(known)}"
        )
    env = envs.get_environment(name, backend=backend, **options)

    def reset(key: jax.Array) -> tuple[Any, jax.Array]:
        state = env.reset(key)
        return state, state.obs

    def step(key: jax.Array, state: Any, action: jax.Array) -> tuple[Any, Transition]:
        del key  # brax's dynamics are deterministic
        # Some environments reward with a Python number, which is no leaf of a scan.
        following = jax.tree.map(
            lambda new, old: jnp.asarray(new, old.dtype), env.step(state, action), state
        )
        terminated = following.done > 0.5
        transition = Transition(
            observation=state.obs,
            action=action,
            reward=following.reward,
            next_observation=following.obs,
            terminated=terminated,
            truncated=jnp.zeros_like(terminated),
        )
        return following, transition

    return Environment(
        reset=reset,
        step=step,
        observe=lambda state: state.obs,
        spec=SpaceSpec(env.observation_size, env.action_size),
    )
