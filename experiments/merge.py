r"""Merges the parameters of experts into one model: a soup, a greedy soup or RegMean.

    python -m experiments.merge --experts=runs/slow,runs/fast --run_dir=runs/soup
    python -m experiments.merge --experts=runs/lm --method=regmean --run_dir=runs/regmean
    python -m experiments.merge --experts=a,b --method=regmean --data=texts/a,texts/b \
        --validation=held_out --run_dir=runs/regmean

Experts are run directories of dynamics models, or folders of language models as Hugging
Face lays them out; all of one architecture. RegMean measures each expert on its own domain
and says first how much memory it takes. The run directory of merged dynamics models is one
of a dynamics model; merged language models lie in its ``model``. ``merge.json`` has the
errors of every expert and of the merged model.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.artifacts.descriptions import MODEL_FILE
from emfuse_jax.energy import check_weights
from emfuse_jax.merging import greedy_soup, model_soup
from emfuse_jax.merging.regmean import check_options
from experiments import _names
from experiments._measure import require
from experiments._merging import Mergeable, check_plan, describe_memory
from experiments._progress import Progress
from experiments._run import Run, open_run, run_main
from experiments._tables import to_plain

RESULT_FILE = "merge.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Settings of a merge.

    Attributes:
        experts: run directories of dynamics models, or folders of language models (a run
            of train_lm_experts stands for its experts).
        run_dir: where everything goes.
        method: soup: the mean; greedy_soup: the mean of those that do not worsen the
            validation error; regmean: least squares, linear layer by linear layer.
        weights: soup, regmean: one per expert, summing to one; none: equal.
        shrinkage: regmean: part of the Grams' off-diagonals that is left out.
        ridge: regmean: pull towards the soup, in units of the mean squared input; above
            0, fewer rows than inputs are allowed.
        data: one per expert, in their order: data sets, or files or folders of text;
            none: what each was trained on, where that is known.
        validation: language models: files or folders of text, for greedy_soup and
            for the errors in merge.json; not those that you report on.
        num_samples: rows or tokens per expert that regmean measures on, at most.
        window: language models: tokens that are read together.
    """

    experts: tuple[str, ...] = ()
    run_dir: str = ""
    method: Literal["soup", "greedy_soup", "regmean"] = "soup"
    weights: tuple[float, ...] = ()
    shrinkage: float = 0.1
    ridge: float = 0.0
    data: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    num_samples: int = 50_000
    window: int = 128

    def __post_init__(self) -> None:
        check_options(self.shrinkage, self.ridge)
        if self.num_samples < 1:
            raise ValueError(f"num_samples={self.num_samples}; expected at least 1")
        if self.weights and self.method == "greedy_soup":
            raise ValueError(
                f"weights={','.join(map(str, self.weights))} are not used by greedy_soup, "
                "which chooses members of equal weight; give method=soup"
            )


def merge(config: MergeConfig) -> dict[str, Any]:
    """Merges, measures, writes ``merge.json`` and returns what it holds."""
    require(config, "experts", "run_dir")
    experts = _open(config)
    if config.weights:
        check_weights(list(config.weights), len(experts.names))
    if config.method == "greedy_soup" and not experts.domains:
        raise ValueError(
            "--method=greedy_soup chooses by a validation error; give --validation, text "
            "that no expert was trained on"
        )
    if experts.plan is not None:
        check_plan(experts, config.ridge, config.num_samples)
        print(describe_memory(experts.plan.memory, len(experts.names)), flush=True)
    created = False
    try:
        with open_run(config.run_dir, config, kind="merge") as run:
            created = not run.resumed
            result = _run(run, config, experts)
    except ValueError:
        # That Grams are singular shows when they are solved: nothing is left behind.
        if created:
            shutil.rmtree(config.run_dir)
        raise
    _print(result)
    return result


def _run(run: Run, config: MergeConfig, experts: Mergeable) -> dict[str, Any]:
    if (run.path / RESULT_FILE).exists():
        return artifacts.read_json(run.path / RESULT_FILE)
    with run.stage("merge"):
        params, facts = _merge(config, experts)
    experts.save(run, params)
    with run.stage("measure"):
        result = to_plain(facts | _measure(config, experts, params))
    run.write_json(RESULT_FILE, result)
    return result


def _open(config: MergeConfig) -> Mergeable:
    """The experts, of whichever family the first is; imports only what that needs."""
    if len(set(config.experts)) < len(config.experts):
        raise ValueError(
            f"--experts={','.join(config.experts)} names a model twice; give each once"
        )
    dynamics = [(pathlib.Path(path) / MODEL_FILE).exists() for path in config.experts]
    if any(dynamics) and not all(dynamics):
        odd = config.experts[dynamics.index(False)]
        with _names.run(odd):
            raise ValueError(
                f"{odd} has no {MODEL_FILE}, so it is no run of a dynamics model, as "
                f"{config.experts[dynamics.index(True)]} is; give experts of one kind"
            )
    options = {
        "with_grams": config.method == "regmean",
        "num_samples": config.num_samples,
    }
    if any(dynamics):
        from experiments._merge_dynamics import open_dynamics

        if config.validation:
            raise ValueError(
                "--validation is for language models; dynamics models are validated on "
                "held-out episodes of --data"
            )
        return open_dynamics(config.experts, config.data, **options)
    for path in map(pathlib.Path, config.experts):
        if any((path / name).exists() for name in ("config.json", "models")):
            continue
        with _names.run(path):
            raise FileNotFoundError(
                f"{path} has neither {MODEL_FILE} (a run of a dynamics model) nor "
                "config.json (a folder of a language model); give experts of either kind"
            )
    from experiments._merge_lm import open_language

    if config.data and config.method != "regmean":
        raise ValueError(
            f"--data={','.join(config.data)} is not used by --method={config.method} of "
            "language models; give --method=regmean, or --validation to measure by"
        )
    texts = (config.data, config.validation)
    return open_language(config.experts, *texts, window=config.window, **options)


def _merge(config: MergeConfig, experts: Mergeable) -> tuple[Any, dict[str, Any]]:
    """The merged parameters, and how they came about."""
    weights = list(config.weights) or None
    if config.method == "soup":
        return model_soup(experts.params, weights), {}
    if config.method == "greedy_soup":
        calls = 2 * len(experts.params) - 1
        with Progress(calls, description="greedy soup", unit="model") as bar:
            done = 0

            def score(params: Any) -> float:
                nonlocal done
                value = -float(np.mean(experts.validate(params)))
                bar.update(done := done + 1, {"score": value})
                return value

            found = greedy_soup(experts.params, score)
        members = [experts.names[index] for index in found.members]
        errors = {n: -s for n, s in zip(experts.names, found.scores, strict=True)}
        facts = {"members": members, "validation": errors | {"merged": -found.score}}
        return found.params, facts
    plan: Any = experts.plan
    options = {"shrinkage": config.shrinkage, "ridge": config.ridge}
    with Progress(plan.num_steps, description="Grams", unit="step") as bar:
        params = plan.merge(bar.update, weights=weights, **options)
    rows = dict(zip(experts.names, plan.num_rows, strict=True))
    memory = plan.memory._asdict() | {"peak": plan.memory.peak(len(rows))}
    return params, options | {"rows": rows, "memory": memory}


def _measure(config: MergeConfig, experts: Mergeable, params: Any) -> dict[str, Any]:
    weights = list(config.weights) or [1.0 / len(experts.names)] * len(experts.names)
    named = zip(experts.names, experts.params, strict=True)
    return {
        "method": config.method,
        "family": experts.family,
        "weights": None if config.method == "greedy_soup" else weights,
        "unit": experts.unit,
        "domains": list(experts.domains),
        "experts": {name: experts.measure(own) for name, own in named},
        "merged": experts.measure(params),
    }


def _print(result: dict[str, Any]) -> None:
    if "members" in result:
        print(
            f"members, in the order in which they joined: {', '.join(result['members'])}"
        )
    if not result["domains"]:
        print("merged; give --validation to measure it beside its experts")
        return
    print(f"{result['unit']} on {', '.join(result['domains'])}")
    for name, errors in [*result["experts"].items(), ("merged", result["merged"])]:
        print(f"{name}: {'  '.join(f'{error:.4f}' for error in errors)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(merge, MergeConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
