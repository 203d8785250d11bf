r"""Trains a policy on data alone and tries it in real MuJoCo.

    python -m experiments.train_policy --method=iql --data=data/hopper.hdf5 --env=hopper \
        --run_dir=runs/iql
    python -m experiments.train_policy --method=bc --data=mine/walker2d/slow-v0 \
        --run_dir=runs/bc --num_seeds=3

Every episode of the data is trained on: what is reported are returns, and none of them is
chosen. Seeds train together as one program. Without ``--env`` nothing is evaluated.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.base import Policy, SpaceSpec, Transition
from emfuse_jax.data import (
    Dataset,
    concatenate,
    episode_bounds,
    load_dataset,
)
from emfuse_jax.data.normalizer import fit_normalizer
from emfuse_jax.policies.chunks import ChunkConfig, chunk_spec, gather_chunks
from emfuse_jax.policies.ibc import action_box
from experiments import _names, _policy_run, presets
from experiments._measure import require
from experiments._methods import VALUED, own_config
from experiments._returns import ONE_STEP, evaluation_env
from experiments._run import open_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """Settings that all methods on data share.

    Attributes:
        method: how the policy is trained.
        data: HDF5 files or Minari ids, joined.
        run_dir: where everything goes.
        env: hopper, walker2d, halfcheetah or pointmaze-umaze; another one or none is not
            evaluated.
        num_updates: gradient steps.
        batch_size: rows per gradient step.
        plan: frames that the policy reads and actions that it plans and executes; the
            transformers' own num_frames and horizon follow it.
        return_range: methods with values: rewards are scaled so that the returns of the
            data's episodes span this much (1000 in implicit Q-learning's locomotion);
            none: as they are.
        chunk: gradient steps per row of metrics.
        eval_every: gradient steps between evaluations and checkpoints.
        eval_episodes: deterministic episodes per evaluation and seed.
        seed: the first one.
        num_seeds: seeds trained together as one program.
        version: gymnasium's rewards, v4 or v5.
    """

    method: str
    data: tuple[str, ...] = ()
    run_dir: str = ""
    env: str = ""
    num_updates: int = 100_000
    batch_size: int = 256
    plan: ChunkConfig = ONE_STEP
    return_range: float | None = 1000.0
    chunk: int = 1000
    eval_every: int = 20_000
    eval_episodes: int = 10
    seed: int = 0
    num_seeds: int = 1
    version: Literal["v4", "v5"] = "v4"

    def __post_init__(self) -> None:
        counts = ("num_updates", "batch_size", "chunk", "eval_every", "eval_episodes")
        for name in (*counts, "num_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_updates", "eval_every"):
            if getattr(self, name) % self.chunk:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a multiple of "
                    f"chunk={self.chunk}"
                )
        if self.method in VALUED and self.plan.horizon > 1:
            raise ValueError(
                f"plan.horizon={self.plan.horizon}: {self.method} values single actions; "
                "plan chunks with bc, diffusion, diffusion_transformer, ebt or ibc"
            )
        if self.return_range is not None and not self.return_range > 0.0:
            raise ValueError(
                f"return_range={self.return_range}; expected a positive range, or none"
            )


_LENGTHS = {
    "demo": {"num_updates": 20_000, "eval_every": 10_000},
    "fast": {},
    "paper": {"num_updates": 1_000_000, "eval_every": 50_000},
}


def method_presets(config_cls: type, method: str) -> dict[str, Callable[[], Any]]:
    """Of one method; ``paper`` trains as long as the publications do."""

    def make(name: str) -> Any:
        own = presets.OFFLINE.get(method)
        settings = {} if own is None else {method: own(name)}
        return config_cls(**_LENGTHS[name], **settings)

    return {name: functools.partial(make, name) for name in presets.NAMES}


def train_offline(config: Any) -> dict[str, Any]:
    """Trains, evaluates, writes ``result.json`` and returns what it holds."""
    require(config, "data", "run_dir")
    env = evaluation_env(
        config.env, config.eval_episodes, config.version, listed_only=False
    )
    dataset = concatenate([_load(source) for source in config.data])
    spec = SpaceSpec(dataset.observation.shape[1], dataset.action.shape[1])
    if env is not None and env.spec != spec:
        raise ValueError(
            f"--env={config.env} has {env.spec}, the data have {spec}; name the "
            "environment of the data"
        )
    if config.method in VALUED:
        dataset = scale_rewards(dataset, config.return_range)
    if env is None:
        print(_policy_run.skipped(config.env), file=sys.stderr)
    with open_run(config.run_dir, config, kind="train_policy", seed=config.seed) as run:
        own, plans = own_config(config), chunk_spec(config.plan, spec)
        _policy_run.describe(
            run, config.method, own, plans, config.num_seeds, plan=config.plan
        )
        policy = artifacts.KINDS[config.method].build(own, plans)
        facts = {"data": list(config.data), "method": config.method, "env": config.env}
        with run.stage("train"):
            _fit(run, config, policy, jax.tree.map(jnp.asarray, dataset), env, facts)
        return _policy_run.finish(run, evaluated=env is not None)


def _load(source: str) -> Dataset:
    with _names.data_set(source):
        return load_dataset(source)


def _fit(
    run: Any, config: Any, policy: Policy, dataset: Dataset, env: Any, facts: Any
) -> None:
    def init(key: jax.Array, options: dict[str, Any]) -> Any:
        return policy.init(key, **options)

    def sample_batch(key: jax.Array, data: Dataset) -> Transition:
        rows = jax.random.randint(key, (config.batch_size,), 0, data.age.shape[0])
        return gather_chunks(data, rows, config.plan)

    one = config.num_seeds == 1
    key_init, key_fit = _policy_run.seed_keys(config.seed, config.num_seeds)
    options = init_options(policy, dataset, config.plan)
    start = jax.jit(init if one else jax.vmap(init, in_axes=(0, None)))
    run.fit(
        key_fit[0] if one else key_fit,
        policy,
        start(key_init[0] if one else key_init, options),
        sample_batch,
        config.num_updates,
        data=dataset,
        chunk=config.chunk,
        save_every=config.eval_every // config.chunk,
        evaluate=_policy_run.evaluator(
            run, config, policy, env, facts, plan=config.plan
        ),
        description=f"train {config.method}",
    )


def init_options(
    policy: Policy, dataset: Dataset, plan: ChunkConfig = ONE_STEP
) -> dict[str, Any]:
    """Of ``policy.init``: a normaliser of the data's observations and the box of its
    actions, where it takes them. On the host: the box is checked."""
    takes = inspect.signature(policy.init).parameters
    options: dict[str, Any] = {}
    if "normalizer" in takes:
        rows = np.arange(len(dataset.age))
        chunks = gather_chunks(dataset, rows, plan)
        options["normalizer"] = fit_normalizer(chunks.observation)
        if "box" in takes:
            options["box"] = action_box(chunks.action)
    return options


def scale_rewards(dataset: Dataset, return_range: float | None) -> Dataset:
    """Rewards in units in which the episodes' returns span ``return_range``.

    Raises:
        ValueError: if all episodes have the same return, which no factor changes.
    """
    if return_range is None:
        return dataset
    starts, _ = episode_bounds(dataset)
    returns = np.add.reduceat(np.asarray(dataset.reward, np.float64), starts)
    span = returns.max() - returns.min()
    if not span > 0.0:
        raise ValueError(
            f"the returns of all {len(starts)} episodes are {returns.max():.6g}: they "
            "have no range to scale; give --return_range=none"
        )
    factor = np.float32(return_range / span)
    return dataset._replace(reward=dataset.reward * factor)
