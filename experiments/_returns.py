"""Returns of policies in MuJoCo, per seed and episode, and what tables say of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import Policy, SpaceSpec
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.envs.mujoco_table import ENVIRONMENTS
from emfuse_jax.envs.pointmaze import MAZES, PointMazeBatch
from emfuse_jax.evaluation.episodes import MAX_STEPS, ActFn, evaluate
from emfuse_jax.evaluation.scores import normalized_score, reference_score
from emfuse_jax.evaluation.statistics import hierarchical_bootstrap, iqm
from emfuse_jax.policies.chunks import ChunkConfig, receding_horizon
from experiments import _names

Act = Callable[[Any, jax.Array, Any], Any]
"""``(params, key, observation [env, obs]) -> action``, compiled once."""
ONE_STEP = ChunkConfig(num_frames=1, horizon=1, execute=1)
"""One observation, one action: no chunks."""


def evaluation_env(
    name: str, num_envs: int, version: str, *, listed_only: bool = True
) -> MujocoBatch | None:
    """The environment to evaluate in; None where there is none.

    Args:
        name: of the environment; empty where none is wanted.
        num_envs: stepped together.
        version: gymnasium's rewards.
        listed_only: whether an environment that is not listed is an error.
    """
    if name in MAZES:
        return PointMazeBatch(name, num_envs)
    if not name or (name not in ENVIRONMENTS and not listed_only):
        return None
    with _names.environment(name):
        return MujocoBatch(name, num_envs, version=version)


class PlanningAct:
    """A policy of chunks, compiled once: `start` gives the ``act`` of new episodes."""

    def __init__(
        self, policy: Policy, plan: ChunkConfig, spec: SpaceSpec, *, stochastic: bool
    ) -> None:
        horizon = receding_horizon(policy.act, plan, spec)
        self._init = horizon.init
        self._act = jax.jit(
            functools.partial(horizon.act, deterministic=not stochastic)
        )

    def start(self, params: Any, num_envs: int) -> ActFn:
        """``act(key, observation [env, obs])``, which remembers frames and plans."""
        state = self._init((num_envs,))

        def act(key: jax.Array, observation: Any) -> Any:
            nonlocal state
            state, action = self._act(params, key, state, jnp.asarray(observation))
            return action

        return act


def compiled_act(
    policy: Policy,
    *,
    stochastic: bool = False,
    plan: ChunkConfig = ONE_STEP,
    spec: SpaceSpec | None = None,
) -> Act | PlanningAct:
    """The policy's action function; make it once, a second one would compile again.

    Args:
        policy: who acts.
        stochastic: sample actions.
        plan: of a policy of chunks, for which ``spec`` is the environment's.
        spec: see ``plan``.
    """
    if plan != ONE_STEP and spec is not None:
        return PlanningAct(policy, plan, spec, stochastic=stochastic)
    return jax.jit(functools.partial(policy.act, deterministic=not stochastic))


def evaluate_seeds(
    key: jax.Array,
    env: MujocoBatch,
    act: Act | PlanningAct,
    params: Any,
    num_seeds: int,
    num_episodes: int,
    *,
    max_steps: int | None = None,
    on_step: Callable[[], None] | None = None,
) -> np.ndarray:
    """Returns ``[seed, episode]``; ``params`` lead with the seed axis where there is more
    than one. Every seed plays episodes of its own, of ``max_steps`` or the environment's
    own limit. ``on_step`` is called before each action."""
    if max_steps is None:
        max_steps = getattr(env, "max_steps", MAX_STEPS)
    returns = []
    for seed in range(num_seeds):
        own = params
        if num_seeds > 1:
            own = jax.tree.map(lambda leaf, i=seed: leaf[i], params)
        stats = evaluate(
            jax.random.fold_in(key, seed),
            env,
            _counted(act, own, env.num_envs, on_step),
            num_episodes,
            max_steps=max_steps,
        )
        returns.append(np.asarray(stats.returns))
    return np.stack(returns)


def _counted(act: Act | PlanningAct, params: Any, num_envs: int, on_step: Any) -> ActFn:
    if isinstance(act, PlanningAct):
        own = act.start(params, num_envs)
    else:
        own = functools.partial(act, params)
    if on_step is None:
        return own

    def counted(key: jax.Array, observation: Any) -> Any:
        on_step()
        return own(key, observation)

    return counted


def summary(returns: np.ndarray, env: str) -> dict[str, Any]:
    """`summarize_scores` of returns ``[seed, episode]``, normalised."""
    return summarize_scores(np.asarray(normalized_score(returns, reference_score(env))))


def summarize_scores(scores: np.ndarray) -> dict[str, Any]:
    """Scores ``[seed, episode]`` as JSON: mean and interquartile mean, each with a 95 %
    interval by resampling seeds, then episodes."""
    interval = hierarchical_bootstrap(jax.random.key(0), jnp.asarray(scores))
    robust = hierarchical_bootstrap(jax.random.key(0), jnp.asarray(scores), iqm)
    return {
        "mean": float(scores.mean()),
        "interval": [float(interval.low), float(interval.high)],
        "iqm": float(robust.estimate),
        "iqm_interval": [float(robust.low), float(robust.high)],
        "per_seed": scores.mean(axis=1).tolist(),
        "episodes": scores.tolist(),
    }
