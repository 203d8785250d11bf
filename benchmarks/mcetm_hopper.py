r"""Is MC-ETM as good a model of Hopper as ETM and ADETM for equal CPU time, and with a tenth
of the data?

    python -m experiments.collect_data --env=hopper --policy=hopper_medium \
        --steps=25000 --out=hopper.hdf5
    python -m experiments.collect_data --env=hopper --policy=random --steps=6000 \
        --out=random.hdf5
    python -m benchmarks.mcetm_hopper --data=hopper.hdf5 --other=random.hdf5

Per seed and share of the data it trains one model of each kind for ``--seconds`` of CPU time
(one thread; `benchmarks.model_quality` has the protocol) and measures open-loop errors
after 1, 5 and 10 steps on held-out episodes, and how well the uncertainty of each tells
rows of ``--other``, data of another policy, and large errors: the least energy over
candidates for the one-step models, the slices' spread for ADETM.
"""

import dataclasses
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import numpy as np

from benchmarks import _quality as quality
from benchmarks._quality import Model
from benchmarks._timing import portable
from benchmarks.model_quality import LAGS, train
from emfuse_jax import artifacts
from emfuse_jax.data import Dataset
from emfuse_jax.dynamics import (
    AdetmConfig,
    CandidateConfig,
    EtmConfig,
    McetmConfig,
    SamplingConfig,
    min_energy_model,
    transition_model,
)
from experiments._measure import Measured, load_domains, pooled_unit, require
from experiments._run import run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class HopperConfig:
    """Settings of the comparison.

    Attributes:
        data: HDF5 file that models are trained on.
        other: HDF5 file of another policy, out of the models' support.
        seconds: CPU time per model.
        seeds: of weights and batches.
        shares: parts of the training episodes.
        kinds: models to compare.
        mcetm: the recipe.
        work: where trained models are kept.
        output: the JSON result.
    """

    data: str = ""
    other: str = ""
    seconds: float = 30.0
    seeds: tuple[int, ...] = (0, 1)
    shares: tuple[float, ...] = (1.0, 0.1)
    kinds: tuple[str, ...] = ("mcetm", "etm", "adetm")
    mcetm: McetmConfig = McetmConfig()  # noqa: RUF009
    work: str = "runs/mcetm_hopper"
    output: str = "benchmarks/results/mcetm_hopper.json"


def first_part(dataset: Dataset, share: float) -> Dataset:
    """The first episodes, so many that they hold ``share`` of the rows."""
    starts = np.flatnonzero(np.asarray(dataset.age) == 0)
    wanted = round(share * len(dataset.age))
    ends = np.append(starts[1:], len(dataset.age))
    end = int(ends[np.argmin(np.abs(ends - wanted))])
    return jax.tree.map(lambda leaf: leaf[:end], dataset)


def recipe(kind: str, config: HopperConfig) -> Any:
    """The config of a kind; energies of one size."""
    if kind == "mcetm":
        return config.mcetm
    return EtmConfig(energy_sizes=(128, 128)) if kind == "etm" else AdetmConfig()


def measure(kind: str, model: Model, domains: Any, unit: Any) -> dict[str, Any]:
    """Errors on the first domain, and what the model's doubt says of both."""
    predictor = model
    if kind == "adetm":
        doubting = model
    else:

        def build(sampling: SamplingConfig) -> Any:
            return transition_model(model.model.expert, sampling)

        doubting = Model(min_energy_model(build, CandidateConfig()), model.params)
    row = quality.errors(predictor, domains[:1], unit, LAGS)
    inside, outside = (
        Measured(doubting.model, doubting.params, unit, lags=LAGS).one_step(d.test)
        for d in domains
    )
    ranked = quality.rankings([inside], [outside], {})
    return {
        "one_step": row["one_step"][0],
        "k_step": row["k_step"][0],
        "auroc": ranked["uncertainty"]["auroc"],
        "spearman": ranked["uncertainty"]["spearman"],
        "auroc_of_true_error": ranked["true_error"]["auroc"],
    }


def study(config: HopperConfig) -> list[dict[str, Any]]:
    """Trains and measures; writes the JSON after every model."""
    require(config, "data", "other")
    domains = load_domains([config.data], min_length=LAGS)
    domains += load_domains([config.other], min_length=1)
    unit = pooled_unit(domains[:1])
    rows: list[dict[str, Any]] = []
    for seed in config.seeds:
        for share in config.shares:
            data = first_part(domains[0].train, share)
            for kind in config.kinds:
                name = f"{kind}-{share:g}"
                model, cost = train(
                    name,
                    kind,
                    recipe(kind, config),
                    data,
                    config.seconds,
                    seed,
                    config.work,
                )
                found = measure(kind, model, domains, unit)
                facts = {"kind": kind, "share": share, "rows": len(data.age)}
                rows.append({"seed": seed, **facts, **found, "cost": cost})
                print(kind, share, seed, found, flush=True)
                write(config, rows)
    return rows


def write(config: HopperConfig, rows: list[dict[str, Any]]) -> None:
    """The JSON, with means over seeds."""
    summary = {}
    for kind in config.kinds:
        for share in config.shares:
            own = [r for r in rows if (r["kind"], r["share"]) == (kind, share)]
            if not own:
                continue
            means = {
                f"k={k}": np.mean([r["k_step"][k] for r in own])
                for k in own[0]["k_step"]
            }
            for field in ("one_step", "auroc", "spearman"):
                means[field] = np.mean([r[field] for r in own])
            summary[f"{kind}, {share:g} of the data"] = {
                name: float(value) for name, value in means.items()
            }
    path = pathlib.Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(
        path,
        portable(
            {
                "provenance": artifacts.provenance(),
                "config": artifacts.to_json(config),
                "models": rows,
                "summary": summary,
            }
        ),
    )


if __name__ == "__main__":
    sys.exit(run_main(study, HopperConfig))
