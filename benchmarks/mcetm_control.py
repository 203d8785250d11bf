r"""Do policies return more that learn in MC-ETM than in ETM or ADETM, for equal compute?

    python -m benchmarks.mcetm_control --work=runs/mcetm_control

Per seed and share of the data it trains a model of each kind for about equal CPU time (the
JSON has the seconds), then a policy in each with equal updates, as `experiments.train_policy`
does: in ADETM penalised by the spread of the slices and cut where that is large; in MC-ETM
cut where the least energy exceeds its calibration, with dispersion of values in the target;
in ETM, which doubts nothing, neither. Runs that are finished are not done again.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks._timing import portable
from benchmarks.control import behaviour, row
from emfuse_jax import artifacts
from emfuse_jax.dynamics import CandidateConfig
from emfuse_jax.policies.sac import SacConfig
from experiments import collect_data, presets, train_dynamics, train_policy
from experiments._run import run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class McetmControlConfig:
    """Settings of the comparison.

    Attributes:
        env: hopper, walker2d or halfcheetah.
        policies: the behaviour policy that makes the data.
        rows: of the whole data set.
        shares: parts of it, each recorded anew in that many rows.
        kinds: models to compare.
        mcetm_steps: updates of MC-ETM; the defaults take 20 s of one core each.
        etm_steps: of ETM.
        adetm_steps: of ADETM.
        policy_updates: of every policy.
        dispersion: weight of the spread of values over MC-ETM's candidates.
        num_candidates: of MC-ETM, here and where rollouts are cut.
        seeds: of models and policies.
        episodes: deterministic ones per seed.
        work: where data and runs go.
        out: the JSON result.
    """

    env: str = "hopper"
    policies: tuple[str, ...] = ("hopper_medium",)
    rows: int = 25_000
    shares: tuple[float, ...] = (1.0, 0.1)
    kinds: tuple[str, ...] = ("mcetm", "etm", "adetm")
    mcetm_steps: int = 12_000
    etm_steps: int = 15_000
    adetm_steps: int = 7_000
    policy_updates: int = 20_000
    dispersion: float = 1.0
    num_candidates: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    episodes: int = 10
    work: str = "runs/mcetm_control"
    out: str = "benchmarks/results/mcetm_control.json"

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - {"mcetm", "etm", "adetm"}
        if unknown or len(self.policies) != 1:
            raise ValueError(
                f"kinds={self.kinds}, policies={self.policies}; kinds are mcetm, etm and "
                "adetm, and one policy makes the data"
            )


def record(config: McetmControlConfig, share: float) -> str:
    """The data set's file."""
    path = pathlib.Path(config.work) / f"data-{share:g}.hdf5"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        collect_data.run(
            collect_data.CollectConfig(
                env=config.env,
                policy=config.policies[0],
                steps=round(config.rows * share),
                out=str(path),
            )
        )
    return str(path)


def sampler(config: McetmControlConfig) -> CandidateConfig:
    """Of MC-ETM's threshold, and of the rollouts that it cuts."""
    return CandidateConfig(num_candidates=config.num_candidates)


def model(
    config: McetmControlConfig, kind: str, data: str, seed: int, run_dir: str
) -> dict[str, Any]:
    """Trains one model; its ``result.json``."""
    own = dataclasses.replace(
        getattr(presets, kind)("fast"), num_steps=getattr(config, f"{kind}_steps")
    )
    settings: dict[str, Any] = {"data": (data,), "run_dir": run_dir, "seed": seed}
    settings |= {"model": kind, kind: own, "candidates": sampler(config)}
    return train_dynamics.train(train_dynamics.TrainDynamicsConfig(**settings))


def policy(
    config: McetmControlConfig, kind: str, model_dir: str, seed: int, run_dir: str
) -> dict[str, Any]:
    """Trains and plays one policy; its ``result.json``."""
    sac = SacConfig(actor_decay_steps=config.policy_updates, max_temperature=1.0)
    own: dict[str, Any] = {}
    if kind == "mcetm":
        own |= {"cut": "energy", "candidates": sampler(config)}
        sac = dataclasses.replace(sac, dispersion=config.dispersion)
    if kind == "etm":
        own |= {"penalty": 0.0, "cut_quantile": None}
    rollout = presets.model_based("fast")
    per_rollout = min(rollout.updates_per_rollout, config.policy_updates)
    return train_policy.train(
        train_policy.TrainPolicyConfig(
            model=model_dir,
            run_dir=run_dir,
            env=config.env,
            num_updates=config.policy_updates,
            eval_every=config.policy_updates,
            eval_episodes=config.episodes,
            rollout=dataclasses.replace(rollout, updates_per_rollout=per_rollout),
            sac=sac,
            seed=seed,
            **own,
        )
    )


def compare(config: McetmControlConfig) -> dict[str, Any]:
    """Trains and plays everything; the JSON is written after every policy."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    played = row(behaviour(config, config.policies[0])[None])
    for seed in config.seeds:
        for share in config.shares:
            data = record(config, share)
            for kind in config.kinds:
                folder = pathlib.Path(config.work) / f"{kind}-{share:g}-seed{seed}"
                made = model(config, kind, data, seed, str(folder / "model"))
                result = policy(
                    config, kind, str(folder / "model"), seed, str(folder / "policy")
                )
                own = {"model": made, "policy": result, "seed": seed}
                found.setdefault((kind, share), []).append(own)
                print(
                    f"{kind}, {share:g} of the data, seed {seed}: {result['mean']:.1f}"
                )
                write(config, found, played)
    return {f"{kind}, {share:g}": rows for (kind, share), rows in found.items()}


def write(config: McetmControlConfig, found: Any, played: dict[str, Any]) -> None:
    """The JSON, with means over seeds and their intervals."""
    table: dict[str, Any] = {"behaviour": played}
    for (kind, share), runs in found.items():
        scores = np.concatenate([np.asarray(r["policy"]["episodes"]) for r in runs])
        table[f"{kind}, {share:g} of the data"] = {
            **row(scores),
            "model_cpu_seconds": [r["model"]["cpu_seconds"] for r in runs],
            "policy_cpu_seconds": [r["policy"]["cpu_seconds"] for r in runs],
            "test_rms": [list(r["model"]["test_rms"].values()) for r in runs],
        }
    result = {
        "question": (__doc__ or "").split("\n")[0],
        "provenance": artifacts.provenance(),
        "config": artifacts.to_json(config),
        "table": table,
    }
    path = pathlib.Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(path, portable(result))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(compare, McetmControlConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
