r"""Fuses trained dynamics models and measures the fusion on every expert's held-out data.

    python -m experiments.fuse_dynamics --experts=runs/slow,runs/fast --run_dir=runs/fused
    python -m experiments.fuse_dynamics --experts=runs/a,runs/b --fusion.rule=fixed \
        --fusion.weights=0.3,0.7 --run_dir=runs/fused

The run directory holds the members' parameters: it needs theirs no more.
``fusion.json`` has the errors of every expert on every domain, of the fusion with its
rule and with uniform weights, and how well the uncertainty ranks the errors.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.artifacts import Trained
from emfuse_jax.dynamics import FusionConfig
from emfuse_jax.energy import check_weights
from emfuse_jax.evaluation.fidelity import auroc, spearman
from experiments._measure import (
    Domain,
    Measured,
    OneStep,
    load_domains,
    pooled_unit,
    require,
)
from experiments._run import open_run, run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseDynamicsConfig:
    """Settings of a fusion.

    Attributes:
        experts: run directories of trained dynamics models, at least one.
        run_dir: where everything goes.
        fusion: rule, weights and sampling.
        data: held-out domains; none: the data that the experts were trained on.
    """

    experts: tuple[str, ...] = ()
    run_dir: str = ""
    fusion: FusionConfig = FusionConfig()  # noqa: RUF009
    data: tuple[str, ...] = ()


def main(config: FuseDynamicsConfig) -> dict[str, Any]:
    """Fuses, measures, writes ``fusion.json`` and returns what it holds."""
    require(config, "experts", "run_dir")
    if config.fusion.rule == "fixed":
        check_weights(config.fusion.weights, len(config.experts))
    experts = [artifacts.load_run(path) for path in config.experts]
    for path, expert in zip(config.experts, experts, strict=True):
        if expert.model is None or expert.model.expert is None:
            raise ValueError(
                f"{path} holds a {expert.description['kind']!r}, which has no energy of "
                "its own to fuse; give runs of adetm or etm"
            )
    members = [expert.description for expert in experts]
    description = artifacts.describe_fusion(members, config.fusion)
    params = artifacts.join_params(members, [expert.params for expert in experts])
    model = artifacts.build(description)
    sources = config.data or _sources(config.experts)
    lags = experts[0].model.expert.num_lags
    domains = load_domains(sources, min_length=1)
    with open_run(config.run_dir, config, kind="fuse_dynamics") as run:
        artifacts.write_description(run.path, description)
        if not artifacts.steps(run.checkpoints):
            run.save(0, params)
        with run.stage("measure"):
            uniform = artifacts.build(
                artifacts.describe_fusion(
                    members,
                    dataclasses.replace(config.fusion, rule="uniform", weights=()),
                )
            )
            result = measure(
                {config.fusion.rule: model, "uniform": uniform},
                params,
                dict(zip(config.experts, experts, strict=True)),
                domains,
                lags,
            )
        run.write_json("fusion.json", result)
    _print(result)
    return result


def measure(
    fused: dict[str, Any],
    params: Any,
    experts: dict[str, Trained],
    domains: Sequence[Domain],
    lags: int,
) -> dict[str, Any]:
    """Held-out errors and uncertainties of experts and fusions, as JSON.

    Args:
        fused: transition models by rule; the first is the fusion in question.
        params: theirs, one for all.
        experts: by name.
        domains: what to measure on.
        lags: history that the models read.
    """
    unit = pooled_unit(domains)
    result: dict[str, Any] = {"domains": [domain.name for domain in domains]}
    singles = {}
    for name, expert in experts.items():
        measured = Measured(expert.model, expert.params, unit, lags=lags)
        rows = [measured.one_step(domain.test) for domain in domains]
        singles[name] = {
            "one_step": [row.rms for row in rows],
            "k_step": [measured.k_step(domain.test) for domain in domains],
        } | _ranks(rows)
    result["experts"] = singles
    result["fused"] = {}
    for rule, model in fused.items():
        measured = Measured(model, params, unit, lags=lags)
        rows = [measured.one_step(domain.test) for domain in domains]
        result["fused"][rule] = {
            "one_step": [row.rms for row in rows],
            "k_step": [measured.k_step(domain.test) for domain in domains],
        } | _ranks(rows)
        if rule == next(iter(fused)):
            result["scatter"] = _scatter(rows)
    mean_single = float(np.mean([single["one_step"] for single in singles.values()]))
    result["ratio_to_mean_single"] = {
        rule: float(np.mean(row["one_step"])) / mean_single
        for rule, row in result["fused"].items()
    }
    return result


def _ranks(rows: Sequence[OneStep]) -> dict[str, float]:
    """How uncertainty ranks the errors over all domains together."""
    error = jnp.concatenate([row.error for row in rows])
    uncertainty = jnp.concatenate([row.uncertainty for row in rows])
    large = error > jnp.quantile(error, 0.9)
    return {
        "spearman": float(spearman(uncertainty, error)),
        "auroc_top_decile": float(auroc(uncertainty, large)),
    }


def _scatter(rows: Sequence[OneStep], count: int = 500) -> dict[str, list[float]]:
    error = np.concatenate([row.error for row in rows])
    uncertainty = np.concatenate([row.uncertainty for row in rows])
    chosen = np.linspace(0, len(error) - 1, min(count, len(error))).astype(int)
    return {
        "error": error[chosen].tolist(),
        "uncertainty": uncertainty[chosen].tolist(),
    }


def _sources(experts: Sequence[str]) -> tuple[str, ...]:
    """The data that the experts were trained on, each once."""
    configs = [
        artifacts.read_json(pathlib.Path(path) / "config.json") for path in experts
    ]
    sources = [source for config in configs for source in config["config"]["data"]]
    return tuple(dict.fromkeys(sources))


def _print(result: dict[str, Any]) -> None:
    rows = {
        **result["experts"],
        **{f"fused, {k}": v for k, v in result["fused"].items()},
    }
    for name, row in rows.items():
        errors = "  ".join(f"{value:.3f}" for value in row["one_step"])
        print(f"{name}: one-step {errors}, Spearman(u, error) {row['spearman']:.2f}")
    for rule, ratio in result["ratio_to_mean_single"].items():
        print(f"fused ({rule}) / mean of single experts: {ratio:.3f}")


if __name__ == "__main__":
    sys.exit(run_main(main, FuseDynamicsConfig))
