r"""Does a policy trained in the fused model beat those of single experts and the behaviour?

    python -m benchmarks.control --env=hopper --fused=runs/fused --experts=runs/a,runs/b \
        --policies=a.npz,b.npz --work=runs/control --workers=2

Trains one policy per model and seed with `experiments.train_policy` (equal updates), one
process per core, evaluates the behaviour policies that made the data beside them, and
resamples seeds, then episodes. Runs already finished are not run again.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._timing import portable
from emfuse_jax import artifacts
from emfuse_jax.data.behaviour import behaviour_act, load_behaviour
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.evaluation.episodes import evaluate
from emfuse_jax.evaluation.scores import normalized_score, reference_score
from emfuse_jax.evaluation.statistics import hierarchical_bootstrap
from experiments._measure import require
from experiments._run import run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Settings of the comparison.

    Attributes:
        env: hopper, walker2d or halfcheetah.
        fused: run directory of the fusion.
        experts: run directories of its members.
        policies: the behaviour policies that made the data.
        seeds: of the policies.
        flags: more flags for train_policy, such as --num_updates=60000.
        episodes: deterministic episodes per seed.
        workers: processes at a time, one core each.
        work: where the policies' runs go.
        out: the JSON result.
    """

    env: str = "hopper"
    fused: str = ""
    experts: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    flags: tuple[str, ...] = ()
    episodes: int = 20
    workers: int = 1
    work: str = "runs/control"
    out: str = "benchmarks/results/control.json"


def train_one(
    config: ControlConfig, name: str, model: str, seed: int
) -> dict[str, Any]:
    """One policy in a process of its own, on one thread; its ``result.json``."""
    run_dir = pathlib.Path(config.work) / f"{name}-seed{seed}"
    command = [
        sys.executable,
        "-m",
        "experiments.train_policy",
        f"--model={model}",
        f"--env={config.env}",
        f"--run_dir={run_dir}",
        f"--seed={seed}",
        f"--eval_episodes={config.episodes}",
        *config.flags,
    ]
    threads = {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run_dir}.log", "a") as log:
        subprocess.run(
            command, env={**os.environ, **threads}, stdout=log, stderr=log, check=True
        )
    result = artifacts.read_json(run_dir / "result.json")
    print(f"{name}, seed {seed}: {result['mean']:.1f} normalised", flush=True)
    return result


def behaviour(config: ControlConfig, path: str) -> np.ndarray:
    """Normalised returns of a behaviour policy as it made the data: stochastic."""
    env = MujocoBatch(config.env, 10)
    episodes = config.episodes * len(config.seeds)
    act = behaviour_act(load_behaviour(path))
    stats = evaluate(jax.random.key(99), env, act, episodes)
    return np.asarray(normalized_score(stats.returns, reference_score(config.env)))


def row(scores: np.ndarray) -> dict[str, Any]:
    """Mean and interval of normalised returns ``[seed, episode]``."""
    interval = hierarchical_bootstrap(jax.random.key(0), jnp.asarray(scores))
    return {
        "mean": float(scores.mean()),
        "interval": [float(interval.low), float(interval.high)],
        "per_seed": scores.mean(axis=1).tolist(),
    }


def compare(config: ControlConfig) -> dict[str, Any]:
    """Runs everything and writes the JSON."""
    require(config, "fused", "experts", "policies")
    models = {"fused": config.fused} | {
        f"expert-{i}": path for i, path in enumerate(config.experts)
    }
    jobs = [(name, seed) for seed in config.seeds for name in models]
    with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
        futures = {
            job: pool.submit(train_one, config, job[0], models[job[0]], job[1])
            for job in jobs
        }
        results = {job: future.result() for job, future in futures.items()}
    table: dict[str, Any] = {}
    for name in models:
        runs = [results[name, seed] for seed in config.seeds]
        table[name] = row(np.concatenate([np.asarray(r["episodes"]) for r in runs]))
        table[name]["cpu_seconds"] = [r["cpu_seconds"] for r in runs]
    for path in config.policies:
        scores = behaviour(config, path)
        table[f"behaviour {pathlib.Path(path).stem}"] = row(scores[None])
    best = max(v["mean"] for k, v in table.items() if k.startswith("behaviour"))
    result = {
        "provenance": artifacts.provenance(),
        "config": artifacts.to_json(config),
        "table": table,
        "fused_minus_best_behaviour": table["fused"]["mean"] - best,
        "fused_minus_experts": {
            name: table["fused"]["mean"] - table[name]["mean"]
            for name in models
            if name != "fused"
        },
    }
    path = pathlib.Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(path, portable(result))
    for name, entry in table.items():
        low, high = entry["interval"]
        print(f"{name}: {entry['mean']:.1f} [{low:.1f}, {high:.1f}]", flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(compare, ControlConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
