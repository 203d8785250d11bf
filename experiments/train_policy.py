r"""Trains a policy inside a dynamics model and tries it in real MuJoCo.

    python -m experiments.train_policy --model=runs/fused --env=hopper --run_dir=runs/policy
    python -m experiments.train_policy --model=runs/expert --run_dir=runs/mine \
        --terminated=my_module:my_function

Branch rollouts start from the data behind the model (or ``--data``), are penalised by its
uncertainty and fill the buffer of soft actor-critic. Every environment that is not listed
trains as well, given its termination rule; only the evaluation is skipped then.
``result.json`` has the returns of the last policy: none is chosen by its return.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.data import Dataset, concatenate, gather_history
from emfuse_jax.dynamics import rollout
from emfuse_jax.envs.termination import get_terminated_fn
from emfuse_jax.policies.model_based import Imagined, ModelBasedConfig, model_based
from emfuse_jax.policies.sac import SacConfig
from experiments import presets
from experiments._measure import load_domains, require
from experiments._returns import evaluate_seeds, evaluation_env, summary
from experiments._run import Run, open_run, run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainPolicyConfig:
    """Settings of one policy, or of several seeds of it.

    Attributes:
        model: run directory of a dynamics model or of a fusion.
        run_dir: where everything goes.
        env: hopper, walker2d or halfcheetah; empty: not evaluated.
        terminated: module:function that says when an episode ends; empty: the env's.
        data: where rollouts start; none: the data behind the model.
        num_updates: gradient steps of the policy.
        penalty: subtracted from the reward per unit of uncertainty.
        cut_quantile: rollouts are cut where the uncertainty exceeds this quantile of
            it on the data; none: never.
        rollout: branches, buffer and batches.
        sac: the policy.
        seed: the first one.
        num_seeds: seeds trained together as one program.
        eval_every: gradient steps between evaluations.
        eval_episodes: deterministic episodes per evaluation and seed.
        version: gymnasium's rewards, v4 or v5.
    """

    model: str = ""
    run_dir: str = ""
    env: str = ""
    terminated: str = ""
    data: tuple[str, ...] = ()
    num_updates: int = 50_000
    penalty: float = 1.0
    cut_quantile: float | None = None
    rollout: ModelBasedConfig = ModelBasedConfig()  # noqa: RUF009
    sac: SacConfig = SacConfig()  # noqa: RUF009
    seed: int = 0
    num_seeds: int = 1
    eval_every: int = 10_000
    eval_episodes: int = 10
    version: str = "v4"


PRESETS = {
    "demo": lambda: TrainPolicyConfig(num_updates=10_000, eval_every=5_000),
    "fast": TrainPolicyConfig,
    "paper": functools.partial(
        TrainPolicyConfig,
        num_updates=3_000_000,
        sac=presets.sac("paper"),
        rollout=presets.model_based("paper"),
    ),
}
POLICY_FOLDER = "policy"


def main(config: TrainPolicyConfig) -> dict[str, Any]:
    """Trains, evaluates, writes ``result.json`` and returns what it holds."""
    require(config, "model", "run_dir")
    if not config.env and not config.terminated:
        raise ValueError(
            "--env names a listed environment, --terminated=module:function the rule of "
            "another one; give at least one of them"
        )
    terminated_fn = get_terminated_fn(config.terminated or config.env)
    env = evaluation_env(config.env, config.eval_episodes, config.version)
    trained = artifacts.load_run(config.model)
    if trained.model is None:
        raise ValueError(
            f"{config.model} holds a policy; --model wants a dynamics model"
        )
    domains = load_domains(config.data or sources(trained, config.model), min_length=1)
    dataset = concatenate([domain.train for domain in domains])
    if (dataset.observation.shape[1], dataset.action.shape[1]) != trained.spec:
        raise ValueError(
            f"the data have sizes {(dataset.observation.shape[1], dataset.action.shape[1])}, "
            f"{config.model} was trained on {tuple(trained.spec)}"
        )
    dataset = jax.tree.map(jnp.asarray, dataset)
    with open_run(config.run_dir, config, kind="train_policy", seed=config.seed) as run:
        return _train(run, config, trained, dataset, terminated_fn, env)


def sources(trained: artifacts.Trained, path: str) -> tuple[str, ...]:
    """The data behind a run of a dynamics model or of a fusion."""
    config = artifacts.read_json(f"{path}/config.json")["config"]
    if "experts" not in config or config["data"]:
        return tuple(config["data"])
    configs = [
        artifacts.read_json(f"{e}/config.json")["config"] for e in config["experts"]
    ]
    return tuple(dict.fromkeys(source for c in configs for source in c["data"]))


def _train(
    run: Run,
    config: TrainPolicyConfig,
    trained: artifacts.Trained,
    dataset: Dataset,
    terminated_fn: Callable[..., Any],
    env: Any,
) -> dict[str, Any]:
    if config.num_updates % config.rollout.updates_per_rollout:
        raise ValueError(
            f"num_updates={config.num_updates} must be a multiple of "
            f"rollout.updates_per_rollout={config.rollout.updates_per_rollout}"
        )
    description = artifacts.describe(
        "sac",
        config.sac,
        trained.spec,
        params_in=POLICY_FOLDER,
        num_seeds=config.num_seeds,
    )
    artifacts.write_description(run.path, description)
    policy = artifacts.build(description)
    learner = model_based(
        policy,
        rollout_fn(config, trained, dataset, terminated_fn),
        config.rollout,
        trained.spec,
    )
    keys = [
        jax.random.split(jax.random.key(config.seed + i))
        for i in range(config.num_seeds)
    ]
    key_init, key_fit = jnp.stack([k[0] for k in keys]), jnp.stack([k[1] for k in keys])
    one = config.num_seeds == 1
    init = learner.init if one else jax.vmap(learner.init)
    per_chunk = config.rollout.updates_per_rollout
    started, result = time.process_time(), {}

    def evaluate(chunks: int, state: Any) -> dict[str, float]:
        step, params = chunks * per_chunk, state.params
        artifacts.delete_after(run.path / POLICY_FOLDER, step - 1)
        artifacts.save(run.path / POLICY_FOLDER, step, params)
        if env is None:
            return {"update": step}
        key = jax.random.key(config.seed + 10_000)
        stats = evaluate_seeds(
            key, env, policy, params, config.num_seeds, config.eval_episodes
        )
        result.update(summary(stats, config.env), step=step)
        run.write_json("result.json", result)
        return {"update": step, "normalized_return": result["mean"]}

    with run.stage("train"):
        run.fit(
            key_fit[0] if one else key_fit,
            learner,
            init(key_init[0] if one else key_init),
            lambda key, data: data,
            config.num_updates // per_chunk,
            data=(trained.params, dataset),
            chunk=1,
            save_every=max(config.eval_every // per_chunk, 1),
            evaluate=evaluate,
            description="train policy",
        )
    return _finish(run, config, time.process_time() - started)


def rollout_fn(
    config: TrainPolicyConfig,
    trained: artifacts.Trained,
    dataset: Dataset,
    terminated_fn: Callable[..., Any],
) -> Callable[..., Imagined]:
    """Branches for `model_based`: penalised, cut where the model knows too little."""
    lags = getattr(trained.model.expert, "num_lags", 1)
    threshold = None
    if config.cut_quantile is not None:
        threshold = uncertainty_quantile(trained, dataset, lags, config.cut_quantile)

    def branch(params: Any, key: jax.Array, policy: Any, data: Dataset) -> Imagined:
        key_rows, key_rollout = jax.random.split(key)
        num_rows = data.age.shape[0]
        rows = jax.random.randint(
            key_rows, (config.rollout.rollout_rows,), 0, num_rows - 1
        )
        # A single slice knows no uncertainty: step over first rows where one can.
        rows = jnp.where(
            (data.age[rows] == 0) & (data.age[rows + 1] == 1), rows + 1, rows
        )
        steps = rollout(
            params,
            key_rollout,
            trained.model,
            policy,
            gather_history(data, rows, lags),
            config.rollout.horizon,
            terminated_fn=terminated_fn,
            penalty=config.penalty,
            truncate_above=threshold,
        )
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)
        return Imagined(flat.transition, flat.valid, flat.uncertainty)

    return branch


def uncertainty_quantile(
    trained: artifacts.Trained, dataset: Dataset, lags: int, quantile: float
) -> float:
    """A quantile of the model's uncertainty on rows of the data."""
    rows = np.linspace(0, len(dataset.age) - 1, 5000).astype(int)
    history = gather_history(dataset, rows, lags)
    values = jax.jit(trained.model.uncertainty)(trained.params, history)
    return float(jnp.quantile(values, quantile))


def _finish(run: Run, config: TrainPolicyConfig, seconds: float) -> dict[str, Any]:
    if not config.env:
        print("no listed --env: trained, evaluation skipped")
        return {}
    result = artifacts.read_json(run.path / "result.json")
    # A finished run that is started again keeps the cost of the start that worked.
    result["cpu_seconds"] = max(result.get("cpu_seconds", 0.0), seconds)
    run.write_json("result.json", result)
    low, high = result["interval"]
    print(
        f"{config.env}: {result['mean']:.1f} normalised, 95 % interval "
        f"[{low:.1f}, {high:.1f}], per seed {[round(x, 1) for x in result['per_seed']]}"
    )
    return result


if __name__ == "__main__":
    sys.exit(run_main(main, TrainPolicyConfig, presets=PRESETS, default_preset="fast"))
