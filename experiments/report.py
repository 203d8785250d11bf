r"""Tables and pictures of finished runs, as Markdown, JSON and PNG.

    python -m experiments.report --out=runs/report --behaviour=runs/hopper_medium.json \
        --runs=runs/slow,runs/fast,runs/fused,runs/policy-slow,runs/policy-fused

Reads what the runs wrote (``fusion.json``, ``result.json``, ``evaluation.json``,
``metrics.jsonl``, ``stages.json``) and trains nothing; only the energy landscapes load
models, and draw actions of policies. A policy's numbers are those of its
``evaluation.json`` if evaluate has made one, else of its own last evaluation.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from emfuse_jax import artifacts
from experiments import _gather, _lm_report, _plots
from experiments._gather import RunFiles
from experiments._measure import require
from experiments._run import run_main
from experiments._sections import Section, draw, markdown
from experiments._tables import Column, to_plain

KIND = "report"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of a report.

    Attributes:
        runs: run directories of train_dynamics, fuse_dynamics, train_policy,
            train_lm_experts, fuse_llm and demo.
        behaviour: JSON files that evaluate wrote of behaviour policies.
        out: folder of report.md, report.json and the pictures; a run directory, an
            earlier report, or a new one.
        title: heading.
        landscape: whether to load the models and draw their energies.
    """

    runs: tuple[str, ...] = ()
    behaviour: tuple[str, ...] = ()
    out: str = "runs/report"
    title: str = "Report"
    landscape: bool = True


def report(config: ReportConfig) -> dict[str, Any]:
    """Writes the report and returns what its JSON holds."""
    require(config, "runs", "out")
    runs = _gather.read_runs(config.runs)
    behaviours = _gather.read_behaviours(config.behaviour)
    out = _folder(config.out)
    sections = [
        *_return_sections(runs, behaviours, out),
        *(_action_sections(runs, out) if config.landscape else ()),
        *(s for r in runs if r.kind == _gather.FUSION for s in _fusion(r, out, config)),
        *_model_sections(runs, out),
        *_lm_report.sections(runs, out),
        *_second_sections(runs),
    ]
    content = to_plain(
        {
            "kind": KIND,
            "title": config.title,
            "sections": {section.title: section.rows for section in sections},
            "runs": list(config.runs),
            "behaviour": list(config.behaviour),
            "provenance": artifacts.provenance(seed=None),
        }
    )
    (out / "report.md").write_text(markdown(config.title, sections))
    artifacts.write_json(out / "report.json", content)
    print(f"{out / 'report.md'}")
    return content


def _folder(path: str) -> pathlib.Path:
    """The folder to write into, made if absent.

    Raises:
        ValueError: if it holds files and is neither a run nor an earlier report.
        OSError: if it cannot be made.
    """
    out = pathlib.Path(path)
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
        raise ValueError(
            f"{out} is not empty and neither a run directory nor an earlier report; "
            "choose another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write into {out} ({error.strerror}); choose another --out"
        ) from error
    return out


def _is_ours(out: pathlib.Path) -> bool:
    for name, kinds in (("report.json", (KIND,)), ("config.json", _gather.KINDS)):
        if (out / name).exists():
            try:
                return artifacts.read_json(out / name).get("kind") in kinds
            except (ValueError, AttributeError):
                return False
    return False


def _return_sections(
    runs: Sequence[RunFiles], behaviours: Sequence[dict[str, Any]], out: pathlib.Path
) -> list[Section]:
    rows = _gather.return_rows(runs, behaviours)
    if not rows:
        return []
    curves = _gather.return_curves(runs, behaviours)
    figures = []
    if curves["curves"]:
        figures = draw(out, "returns.png", _plots.learning_curves, curves)
    columns = [
        Column("policy", "policy"),
        Column("origin", "origin"),
        Column("return", "mean return [95 %]", 1, "max"),
        Column("iqm", "IQM [95 %]", 1, "max"),
        Column("seeds", "seeds"),
        Column("episodes", "episodes"),
    ]
    notes = [
        "D4RL-normalised returns in C MuJoCo (0: random, 100: expert). Intervals resample "
        "seeds, then episodes; with one seed they say nothing about training. Behaviour "
        "policies sample, as when they made the data; the others act deterministically "
        "unless evaluated with --stochastic. Bands of learning curves: the 95 % interval "
        "over episodes of one seed, or the range of several seeds."
    ]
    return [Section("Returns", rows, columns, figures, notes)]


def _action_sections(runs: Sequence[RunFiles], out: pathlib.Path) -> list[Section]:
    from experiments._action_landscape import action_slices

    title = "Energies of actions"
    try:
        data = action_slices(runs)
    except FileNotFoundError as error:
        return [Section(title, (), (), notes=[f"No energy landscape: {error}."])]
    if not data:
        return []
    figures = draw(out, "actions.png", _plots.energy_landscapes, data)
    note = (
        "Of policies trained on data that have one, over the first two dimensions of an "
        "action at the middle row of the data, with actions that the policy draws there."
    )
    return [Section(title, (), (), figures, [note])]


def _fusion(run: RunFiles, out: pathlib.Path, config: ReportConfig) -> list[Section]:
    rows = _gather.fusion_rows(run)
    domains = _gather.domain_names(run.json("fusion.json"))
    errors = [
        Column("model", "model"),
        *(Column(name, name, 3, "min") for name in domains),
        Column("mean", "mean", 3, "min"),
        Column("ratio", "to the mean expert", 3),
    ]
    ranks = [
        Column("model", "model"),
        *(Column(k, f"k = {k[1:]}", 3, "min") for k in rows[0] if k[0] == "k"),
        Column("spearman", "Spearman(u, error)", 2, "max"),
        Column("auroc_outside", "AUROC(own / other)", 2),
    ]
    unit = (
        "Root mean square over held-out rows, in pooled standard deviations of Δs; the "
        "last tenth of each data set's episodes."
    )
    ahead = (
        "Left: open-loop error k steps ahead with the true actions, mean over the data "
        "sets. Right: how the uncertainty ranks the one-step errors of all data sets, and "
        "how it tells other data from the expert's own."
    )
    figures, notes = _landscape(run, out) if config.landscape else ([], [])
    prefix = "" if run.name == "fused" else f"{run.name}-"
    bars = draw(
        out, f"{prefix}errors.png", _plots.model_error_bars, _gather.error_bars(run)
    )
    steps = draw(
        out, f"{prefix}k_step.png", _plots.k_step_errors, _gather.k_step_curves(run)
    )
    clouds = draw(
        out,
        f"{prefix}uncertainty.png",
        _plots.uncertainty_against_error,
        _gather.uncertainty_panels(run),
    )
    return [
        Section(f"Model error: {run.name}", rows, errors, bars, [unit]),
        Section(
            f"Further ahead, and uncertainty: {run.name}",
            rows,
            ranks,
            [*steps, *clouds, *figures],
            [ahead, *notes],
        ),
    ]


def _landscape(
    run: RunFiles, out: pathlib.Path
) -> tuple[list[tuple[str, str]], list[str]]:
    from experiments._landscape import energy_slices

    prefix = "" if run.name == "fused" else f"{run.name}-"
    try:
        data = energy_slices(run)
    except FileNotFoundError as error:
        return [], [f"No energy landscape: {error}."]
    drawn = draw(out, f"{prefix}landscape.png", _plots.energy_landscapes, data)
    return drawn, []


def _model_sections(runs: Sequence[RunFiles], out: pathlib.Path) -> list[Section]:
    rows = _gather.model_rows(runs)
    if not rows:
        return []
    columns = [
        Column("model", "model"),
        Column("data", "data"),
        Column("one_step", "held-out one-step error", 3),
        Column("cpu_seconds", "CPU seconds", 0),
    ]
    curves, figures = _gather.validation_curves(runs), []
    if curves["curves"]:
        label = {"y_label": "validation one-step RMS (std of Δs)"}
        figures = draw(out, "validation.png", _plots.learning_curves, curves, **label)
    return [Section("Training of the models", rows, columns, figures)]


def _second_sections(runs: Sequence[RunFiles]) -> list[Section]:
    rows = _gather.second_rows(runs)
    if not rows:
        return []
    columns = [
        Column("run", "run"),
        Column("stage", "stage"),
        Column("seconds", "seconds", 1),
        Column("cpu", "CPU seconds", 1),
    ]
    return [Section("Seconds per stage", rows, columns)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(report, ReportConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
