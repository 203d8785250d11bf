r"""Fuses trained dynamics models and measures the fusion on every expert's held-out data.

    python -m experiments.fuse_dynamics --experts=runs/slow,runs/fast --run_dir=runs/fused
    python -m experiments.fuse_dynamics --experts=runs/a,runs/b --fusion.rule=fixed \
        --fusion.weights=0.3,0.7 --run_dir=runs/fused

The run directory holds the members' parameters: it needs theirs no more.
``fusion.json`` has the errors of every expert on every domain, of the fusion with its
rule and with uniform weights, and how well the uncertainty ranks the errors. A fusion of
mcetm experts alone is calibrated like each of them: ``calibration.json`` says above which
least energy rollouts in it are cut.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.artifacts import Trained
from emfuse_jax.data import concatenate
from emfuse_jax.dynamics import CandidateConfig, FusionConfig
from emfuse_jax.energy import check_weights
from emfuse_jax.evaluation.fidelity import auroc, spearman
from experiments._measure import (
    Domain,
    Measured,
    check_held_out,
    check_sizes,
    data_behind,
    load_domains,
    pooled_unit,
    require,
)
from experiments._run import open_run, run_main
from experiments._tables import format_cell, to_plain
from experiments._truncation import write_calibration

_SCATTER = 600
"""Rows of (uncertainty, error) that are kept for pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseDynamicsConfig:
    """Settings of a fusion.

    Attributes:
        experts: run directories of trained dynamics models, at least one.
        run_dir: where everything goes.
        fusion: rule, weights and sampling.
        data: held-out domains; none: the data that the experts were trained on.
        candidates: mcetm: the sampler that the fusion's threshold is calibrated for.
        quantile: mcetm: share of held-out rows below the threshold.
    """

    experts: tuple[str, ...] = ()
    run_dir: str = ""
    fusion: FusionConfig = FusionConfig()  # noqa: RUF009
    data: tuple[str, ...] = ()
    candidates: CandidateConfig = CandidateConfig()  # noqa: RUF009
    quantile: float = 0.99

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0:
            raise ValueError(f"quantile={self.quantile} must be between 0 and 1")


def fuse(config: FuseDynamicsConfig) -> dict[str, Any]:
    """Fuses, measures, writes ``fusion.json`` and returns what it holds."""
    require(config, "experts", "run_dir")
    _check_weights(config)
    experts = {path: artifacts.load_run(path) for path in config.experts}
    if len(experts) != len(config.experts):
        raise ValueError(
            f"--experts={','.join(config.experts)} names a run twice; give each once"
        )
    for path, expert in experts.items():
        if expert.model is None or expert.model.expert is None:
            raise ValueError(
                f"{path} holds a {expert.description['kind']!r}, which has no energy of "
                "its own to fuse; give runs of adetm or etm"
            )
    members = [expert.description for expert in experts.values()]
    description = artifacts.describe_fusion(members, config.fusion)
    params = artifacts.join_params(members, [e.params for e in experts.values()])
    uniform = dataclasses.replace(config.fusion, rule="uniform", weights=())
    rules = {
        config.fusion.rule: artifacts.build(description),
        "uniform": artifacts.build(artifacts.describe_fusion(members, uniform)),
    }
    lags = rules["uniform"].expert.num_lags
    domains = load_domains(config.data or data_behind(config.experts), min_length=1)
    first, expert = next(iter(experts.items()))
    check_sizes(domains, expert.spec, first)
    check_held_out(domains, lags)
    with open_run(config.run_dir, config, kind="fuse_dynamics") as run:
        artifacts.write_description(run.path, description)
        if not artifacts.steps(run.checkpoints):
            run.save(0, params)
        with run.stage("measure"):
            result = to_plain(measure(rules, params, experts, domains, lags))
        if all(member["kind"] == "mcetm" for member in members):
            held_out = concatenate([domain.validation for domain in domains])
            calibration = write_calibration(
                run.path,
                artifacts.load_run(run.path),
                held_out,
                config.candidates,
                config.quantile,
            )
            result["truncate_above"] = calibration.threshold
        run.write_json("fusion.json", result)
    _print(result)
    return result


def _check_weights(config: FuseDynamicsConfig) -> None:
    weights = config.fusion.weights
    if config.fusion.rule == "fixed":
        check_weights(list(weights), len(config.experts))
    elif weights:
        raise ValueError(
            f"--fusion.weights={','.join(map(str, weights))} is not used by "
            f"--fusion.rule={config.fusion.rule}; give --fusion.rule=fixed"
        )


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
        experts: by run directory.
        domains: what to measure on.
        lags: history that the models read.
    """
    unit = pooled_unit(domains)
    names = [domain.name for domain in domains]
    singles, fusions = {}, {}
    for path, expert in experts.items():
        measured = Measured(expert.model, expert.params, unit, lags=lags)
        own = [name in data_behind([path]) for name in names]
        singles[path] = {"own": own, **_errors(measured, domains, own)}
    for rule, model in fused.items():
        measured = Measured(model, params, unit, lags=lags)
        fusions[rule] = _errors(measured, domains)
    mean_single = float(np.mean([single["one_step"] for single in singles.values()]))
    return {
        "domains": names,
        "experts": singles,
        "fused": fusions,
        "ratio_to_mean_single": {
            rule: float(np.mean(row["one_step"])) / mean_single
            for rule, row in fusions.items()
        },
    }


def _errors(
    measured: Measured, domains: Sequence[Domain], own: Sequence[bool] | None = None
) -> dict[str, Any]:
    """One model on every domain; ``own`` says on which of them it was trained."""
    rows = [measured.one_step(domain.test) for domain in domains]
    error = np.concatenate([row.error for row in rows])
    uncertainty = np.concatenate([row.uncertainty for row in rows])
    domain = np.repeat(np.arange(len(rows)), [len(row.error) for row in rows])
    large = jnp.asarray(error > np.quantile(error, 0.9))
    outside = jnp.zeros(len(error), bool)
    if own is not None:
        outside = ~jnp.asarray(own)[domain]
    chosen = np.linspace(0, len(error) - 1, min(_SCATTER, len(error))).astype(int)
    return {
        "one_step": [row.rms for row in rows],
        "k_step": [measured.k_step(domain.test) for domain in domains],
        "spearman": float(spearman(jnp.asarray(uncertainty), jnp.asarray(error))),
        "auroc_large_error": float(auroc(jnp.asarray(uncertainty), large)),
        "auroc_outside": float(auroc(jnp.asarray(uncertainty), outside)),
        "scatter": {
            "error": error[chosen].tolist(),
            "uncertainty": uncertainty[chosen].tolist(),
            "outside": outside[chosen].astype(int).tolist(),
        },
    }


def _print(result: dict[str, Any]) -> None:
    rows = {
        **result["experts"],
        **{f"fused, {k}": v for k, v in result["fused"].items()},
    }
    for name, row in rows.items():
        errors = "  ".join(f"{value:.3f}" for value in row["one_step"])
        print(
            f"{name}: one-step {errors}, "
            f"Spearman(u, error) {format_cell(row['spearman'])}"
        )
    for rule, ratio in result["ratio_to_mean_single"].items():
        print(f"fused ({rule}) / mean of single experts: {ratio:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(fuse, FuseDynamicsConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
