"""What a report says, from the JSON files that runs left: no model is loaded here.

Every function takes run directories and returns plain rows for `_tables` and series for
`_plots`.
"""

import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from emfuse_jax import artifacts
from experiments import _names
from experiments._found import run_config
from experiments._returns import summarize_scores

POLICY, MODEL, FUSION, DEMO = "train_policy", "train_dynamics", "fuse_dynamics", "demo"
LM_EXPERTS, LM_FUSION = "train_lm_experts", "fuse_llm"
KINDS = (POLICY, MODEL, FUSION, LM_EXPERTS, LM_FUSION, DEMO)


class RunFiles(NamedTuple):
    """A run directory, read."""

    path: pathlib.Path
    kind: str
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.name

    def json(self, name: str) -> Any:
        """A JSON file of the run; None where it has not been written yet."""
        path = self.path / name
        return artifacts.read_json(path) if path.exists() else None

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        path = self.path / "metrics.jsonl"
        return artifacts.read_metrics(path) if path.exists() else []


def read_runs(paths: Sequence[str]) -> list[RunFiles]:
    """Opens run directories.

    Raises:
        FileNotFoundError: if one is no run directory.
        ValueError: if one is a run of a command that is not reported on, or is not
            finished.
    """
    runs = []
    for path in map(pathlib.Path, paths):
        with _names.run(path):
            if not (path / "config.json").exists():
                raise FileNotFoundError(
                    f"{path} is no run directory (it has no config.json); --runs wants "
                    "what --run_dir named"
                )
        found = artifacts.read_json(path / "config.json")
        if not isinstance(found, dict) or found.get("kind") not in KINDS:
            raise ValueError(
                f"{path} is no run of {', '.join(KINDS[:-1])}; leave it out of --runs"
            )
        run = RunFiles(path, found["kind"], run_config(path))
        wanted = {FUSION: "fusion.json", DEMO: "stages.json"}
        if run.json(wanted.get(run.kind, "result.json")) is None:
            raise ValueError(f"{path} is not finished; run its command again first")
        runs.append(run)
    return runs


def read_behaviours(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Results of `experiments.evaluate`.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if one is no such result.
    """
    results = []
    for path in paths:
        result = artifacts.read_json(path)
        if not isinstance(result, dict) or result.get("kind") != "evaluate":
            raise ValueError(
                f"{path} is no result of evaluate; make it with python -m "
                "experiments.evaluate --policy=NAME --env=ENV --out=FILE"
            )
        results.append(result)
    return results


def policy_groups(runs: Sequence[RunFiles]) -> dict[str, list[RunFiles]]:
    """Policies by name. Runs that differ in nothing but their seed are one method."""
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        if run.kind == POLICY:
            config = {
                k: v for k, v in run.config.items() if k not in ("run_dir", "seed")
            }
            groups.setdefault(json.dumps(config, sort_keys=True), []).append(run)
    names = [_common_name(group) for group in groups.values()]
    if len(set(names)) < len(names):
        names = [str(group[0].path) for group in groups.values()]
    return dict(zip(names, groups.values(), strict=True))


def _common_name(runs: Sequence[RunFiles]) -> str:
    """``fused`` for ``fused-seed0`` and ``fused-seed1``, else the first one's name."""
    if len(runs) == 1:
        return runs[0].name
    return re.sub(r"[-_]?seed[-_]?\d+$", "", runs[0].name) or runs[0].name


def return_rows(
    runs: Sequence[RunFiles], behaviours: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per policy: behaviours, then runs; what was not evaluated has no return."""
    rows = [
        _return_row(result["name"], "behaviour policy", result) for result in behaviours
    ]
    for name, group in policy_groups(runs).items():
        config = group[0].config
        model = config.get("model", "")
        origin = f"trained in {pathlib.Path(model).name}"
        if not model:
            data = ", ".join(pathlib.Path(source).stem for source in config["data"])
            origin = f"{config['method']} on {data}"
        row = _return_row(name, origin, _pool(group))
        rows.append({**row, "model": model})
    return rows


def _pool(group: Sequence[RunFiles]) -> dict[str, Any]:
    """The result of one run, or of several seeds together."""
    results = [run.json("evaluation.json") or run.json("result.json") for run in group]
    if len(results) == 1 or "mean" not in results[0]:
        return results[0]
    episodes = [scores for result in results for scores in result["episodes"]]
    if len({len(scores) for scores in episodes}) > 1:
        raise ValueError(
            f"the seeds {[run.name for run in group]} were evaluated on different numbers "
            "of episodes; run evaluate on each with the same --episodes"
        )
    return {"env": results[0]["env"], **summarize_scores(np.array(episodes))}


def _return_row(name: str, origin: str, result: dict[str, Any]) -> dict[str, Any]:
    row = {"policy": name, "origin": origin, "env": result["env"]}
    if "mean" not in result:
        return row
    return {
        **row,
        "return": {"mean": result["mean"], "interval": result["interval"]},
        "iqm": {"mean": result["iqm"], "interval": result["iqm_interval"]},
        "seeds": len(result["per_seed"]),
        "episodes": sum(map(len, result["episodes"])),
        "per_seed": result["per_seed"],
    }


def fusion_rows(run: RunFiles) -> list[dict[str, Any]]:
    """One row per expert and rule of a fusion: errors by domain, and how they rank."""
    result = run.json("fusion.json")
    mean_single = np.mean([row["one_step"] for row in result["experts"].values()])
    named = {expert_name(path): row for path, row in result["experts"].items()}
    named |= {f"fused, {rule}": row for rule, row in result["fused"].items()}
    rows = []
    for name, row in named.items():
        mean = float(np.mean(row["one_step"]))
        steps = {
            f"k{k}": _mean([domain[k] for domain in row["k_step"]])
            for k in row["k_step"][0]
        }
        rows.append(
            {
                "model": name,
                **dict(zip(domain_names(result), row["one_step"], strict=True)),
                "mean": mean,
                "ratio": mean / float(mean_single),
                **steps,
                "spearman": row["spearman"],
                "auroc_outside": row["auroc_outside"],
            }
        )
    return rows


def domain_names(result: dict[str, Any]) -> list[str]:
    """Short names of a fusion's domains, all different."""
    stems = [pathlib.Path(name).stem for name in result["domains"]]
    return stems if len(set(stems)) == len(stems) else list(result["domains"])


def expert_name(path: str) -> str:
    """``expert`` and the run's name: what the pictures tell from fusions."""
    name = pathlib.Path(path).name
    return name if name.startswith("expert") else f"expert {name}"


def model_rows(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """One row per dynamics model and data set it was trained on."""
    rows = []
    for run in runs:
        if run.kind == MODEL:
            result = run.json("result.json")
            for name, value in result["test_rms"].items():
                row = {"model": run.name, "data": pathlib.Path(name).stem}
                cost = {"cpu_seconds": result["cpu_seconds"]}
                rows.append({**row, "one_step": value, **cost})
    return rows


def second_rows(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """One row per stage of every run: seconds on the clock, and of its CPU time."""
    rows = []
    for run in runs:
        seconds = run.json("stages.json") or {}
        for stage in seconds:
            if not stage.endswith(", cpu"):
                row = {"run": run.name, "stage": stage, "seconds": seconds[stage]}
                if run.kind != DEMO:  # whose processes do the work
                    row["cpu"] = seconds.get(f"{stage}, cpu")
                rows.append(row)
    return rows


def return_curves(
    runs: Sequence[RunFiles], behaviours: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """For `_plots.learning_curves`: returns over training, behaviours as levels."""
    curves = {}
    for name, group in policy_groups(runs).items():
        tables = [
            [row for row in run.metrics() if "normalized_return" in row]
            for run in group
        ]
        if all(tables):
            curves[name] = _return_curve(tables)
    return {"curves": curves, "references": {b["name"]: b["mean"] for b in behaviours}}


def _return_curve(tables: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """One seed with the interval of its episodes, or the mean and range of several."""
    steps = [row["update"] for row in min(tables, key=len)]
    if len(tables) == 1:
        (rows,) = tables
        low = [row.get("return_low", row["normalized_return"]) for row in rows]
        high = [row.get("return_high", row["normalized_return"]) for row in rows]
        values = [row["normalized_return"] for row in rows]
    else:
        cut = [table[: len(steps)] for table in tables]
        returns = np.array([[row["normalized_return"] for row in t] for t in cut])
        values, low, high = returns.mean(0), returns.min(0), returns.max(0)
    return {"step": steps, "value": values, "low": low, "high": high}


def validation_curves(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """For `_plots.learning_curves`: validation error over training."""
    curves = {}
    for run in runs:
        rows = [row for row in run.metrics() if "validation_rms" in row]
        if run.kind == MODEL and rows:
            curves[run.name] = {
                "step": [row["step"] for row in rows],
                "value": [row["validation_rms"] for row in rows],
            }
    return {"curves": curves}


def error_bars(run: RunFiles) -> dict[str, Any]:
    """For `_plots.model_error_bars`."""
    result = run.json("fusion.json")
    models = {expert_name(path): row for path, row in result["experts"].items()}
    models |= {f"fused, {rule}": row for rule, row in result["fused"].items()}
    return {
        "domains": domain_names(result),
        "models": {name: {"value": row["one_step"]} for name, row in models.items()},
    }


def k_step_curves(run: RunFiles) -> dict[str, Any]:
    """For `_plots.k_step_errors`: means over the domains."""
    models = {}
    for row in fusion_rows(run):
        steps = [key for key in row if key.startswith("k") and row[key] is not None]
        if steps:
            models[row["model"]] = {
                "k": [int(step[1:]) for step in steps],
                "value": [row[step] for step in steps],
            }
    return {"models": models}


def uncertainty_panels(run: RunFiles) -> dict[str, Any]:
    """For `_plots.uncertainty_against_error`: a panel per expert and per fusion."""
    result = run.json("fusion.json")
    panels = {}
    for path, row in result["experts"].items():
        panels[expert_name(path)] = {**row["scatter"], "spearman": row["spearman"]}
    for rule, row in result["fused"].items():
        shown = {key: row["scatter"][key] for key in ("error", "uncertainty")}
        panels[f"fused, {rule}"] = {**shown, "spearman": row["spearman"]}
    return {"panels": panels}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else None
