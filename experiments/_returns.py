"""Returns of policies in MuJoCo, per seed and episode, and what tables say of them."""

import functools
from typing import Any

import jax
import numpy as np

from emfuse_jax.base import Policy
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.evaluation.episodes import evaluate
from emfuse_jax.evaluation.scores import normalized_score, reference_score
from emfuse_jax.evaluation.statistics import hierarchical_bootstrap, iqm


def evaluation_env(name: str, num_envs: int, version: str) -> MujocoBatch | None:
    """The environment to evaluate in; None (with an empty name) where there is none."""
    return MujocoBatch(name, num_envs, version=version) if name else None


def evaluate_seeds(
    key: jax.Array,
    env: MujocoBatch,
    policy: Policy,
    params: Any,
    num_seeds: int,
    num_episodes: int,
) -> np.ndarray:
    """Returns ``[seed, episode]`` of the deterministic policies; ``params`` lead with the
    seed axis where there is more than one."""
    act = jax.jit(functools.partial(policy.act, deterministic=True))
    returns = []
    for seed in range(num_seeds):
        own = (
            params
            if num_seeds == 1
            else jax.tree.map(lambda leaf, i=seed: leaf[i], params)
        )
        stats = evaluate(key, env, functools.partial(act, own), num_episodes)
        returns.append(np.asarray(stats.returns))
    return np.stack(returns)


def summary(returns: np.ndarray, env: str) -> dict[str, Any]:
    """Normalised returns ``[seed, episode]`` as JSON: mean, IQM and a 95 % interval by
    resampling seeds, then episodes."""
    scores = np.asarray(normalized_score(returns, reference_score(env)))
    interval = hierarchical_bootstrap(jax.random.key(0), scores)
    return {
        "mean": float(scores.mean()),
        "iqm": float(iqm(scores.ravel())),
        "interval": [float(interval.low), float(interval.high)],
        "per_seed": scores.mean(axis=1).tolist(),
        "episodes": scores.tolist(),
    }
