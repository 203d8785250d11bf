"""What a report says of language models: training, cross-domain matrix, tasks, text.

Runs of fuse_llm that differ in nothing but their experts and seed, and were scored on the
same documents, are training seeds of one study: they have a table together.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments import _lm_plots, _lm_text, _plots
from experiments._gather import LM_EXPERTS, LM_FUSION, RunFiles
from experiments._lm_intervals import accuracy_table, bits_per_byte_table
from experiments._lm_matrix import score_table
from experiments._lm_tasks import task_table
from experiments._sections import Section, draw
from experiments._tables import Column

_OWN = ("run_dir", "experts", "score", "seed")
"""What training seeds of one study may differ in, and the folders of other models."""


def sections(runs: Sequence[RunFiles], out: pathlib.Path) -> list[Section]:
    """The sections on language models; none if there are no such runs.

    Args:
        runs: of any kind.
        out: the report's folder.
    """
    fusions = [run for run in runs if run.kind == LM_FUSION]
    by_mode: dict[str, list[RunFiles]] = {"score": [], "tasks": [], "text": []}
    for run in fusions:
        by_mode[run.json("result.json")["mode"]].append(run)
    return [
        *(s for group in _studies(by_mode["score"]) for s in _matrix(group, out)),
        *(_tasks(run) for run in by_mode["tasks"]),
        *(_text(run, out) for run in by_mode["text"]),
        *_training([run for run in runs if run.kind == LM_EXPERTS], out),
    ]


def _studies(runs: Sequence[RunFiles]) -> list[list[RunFiles]]:
    """Scored runs, training seeds of one study together."""
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        config = {k: v for k, v in run.config.items() if k not in _OWN}
        models = config.get("scoring", {}).get("models", [])
        names = [pathlib.Path(path).name for path in models]
        config["scoring"] = config.get("scoring", {}) | {"models": names}
        result = run.json("result.json")
        text = {k: v["clusters"] for k, v in result["documents"].items()}
        key = json.dumps([config, result["experts"], text], sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def _matrix(group: Sequence[RunFiles], out: pathlib.Path) -> Iterator[Section]:
    results = [run.json("result.json") for run in group]
    first, name = results[0], _group_name(group)
    bits, right = first["bits_per_byte"], first["accuracy"]
    apart, baseline = first["difference"], first["baseline"]
    bits_apart, right_apart = apart["bits_per_byte"], apart["accuracy"]
    if len(group) > 1:
        files = {
            domain: [result["documents"][domain] for result in results]
            for domain in first["documents"]
        }
        bits, bits_apart = bits_per_byte_table(files, baseline=baseline)
        right, right_apart = accuracy_table(files, baseline=baseline)
    seeds = f"{len(group)} training seeds and " if len(group) > 1 else ""
    notes = [
        "Bits per byte of held-out text, given a prompt; lower is better. 95 % intervals "
        f"resample {seeds}documents, windows of one document together. “mixed” are windows "
        "whose halves are of two domains; “mean” is over the other columns. Differences "
        "are of the same resamples." + _counted(first)
    ]
    if first.get("drawn"):
        notes.append(_drawn(first["drawn"]))
    if any(result["passages"] for result in results):
        links = [
            f"[{run.name}]({_link(run.path / 'mixed.html', out)})" for run in group
        ]
        notes.append(f"Weights along mixed text, token by token: {', '.join(links)}.")
    figures = draw(
        out, f"{name}_bits_per_byte.png", _lm_plots.domain_matrix, {"table": bits}
    )
    rows, columns = score_table(bits, bits_apart, baseline=baseline)
    yield Section(f"Bits per byte: {name}", rows, columns, figures, notes)
    if right:
        options = {"baseline": baseline, "best": "max"}
        rows, columns = score_table(right, right_apart, **options)
        asked = (
            "The right continuation among those of other windows of the domain: the one "
            "that is likeliest after this prompt, beside how likely it is after the other "
            "prompts that it was offered to. Chance is 1 in 4."
        )
        yield Section(f"Right answers: {name}", rows, columns, [], [asked])
    rows = list(_weight_rows(results))
    if rows:
        experts = ", ".join(map(_lm_text.short, first["experts"]))
        columns = [
            Column("rule", "rule"),
            Column("text", "text"),
            Column("weights", f"mean weights of {experts}"),
            Column("divergence", "KL(q ‖ p) of each, nats per token"),
        ]
        note = (
            "Along the held-out text, mean over tokens. q is the fused law; where a rule "
            "selects one expert, the uniform pool that the expert stands for."
        )
        yield Section(f"Weights: {name}", rows, columns, [], [note])


def _counted(result: Mapping[str, Any]) -> str:
    parts = [
        f"{domain} {sum(part['windows']):.0f} windows in {len(part['clusters'])}"
        for domain, part in result["documents"].items()
    ]
    return f" Scored: {', '.join(parts)} groups of documents."


def _drawn(drawn: Mapping[str, Any]) -> str:
    def told(cell: Mapping[str, Any]) -> str:
        interval = cell["interval"]
        around = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        return f"{cell['mean']:.2f}{around}"

    parts = [f"{name} {told(cell)}" for name, cell in drawn["nats"].items()]
    return (
        f"KL(Q ‖ P) in nats over {drawn['num_texts']} texts of {drawn['num_tokens']} tokens "
        f"that the uniform pool Q drew: {', '.join(parts)} (of EMSelect's selections)."
    )


def _weight_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over the training seeds."""
    first = results[0]
    for rule in first["rules"]:
        for text in first["weights"]:
            row = {"rule": rule, "text": text}
            for key in ("weights", "divergence"):
                columns = zip(*(r[key][text][rule] for r in results), strict=True)
                means = [
                    "∞" if None in column else f"{sum(column) / len(column):.2f}"
                    for column in columns
                ]
                row[key] = " / ".join(means)
            yield row


def _tasks(run: RunFiles) -> Section:
    rows, columns = task_table(run.json("result.json")["tasks"])
    note = "lm-evaluation-harness; intervals are 1.96 of its standard errors."
    return Section(f"Tasks: {run.name}", rows, columns, [], [note])


def _text(run: RunFiles, out: pathlib.Path) -> Section:
    result = run.json("result.json")
    notes = [f"With colours: [{run.name}]({_link(run.path / 'text.html', out)})."]
    for passage in result["passages"]:
        body = _lm_text.printable(
            _lm_text.show(passage, result["experts"], colour=False)
        )
        fence = "`" * (3 + max(map(len, re.findall("`+", body)), default=0))
        notes.append(
            f"{passage['rule']} ({_lm_text.legend(passage['moves'])}):\n\n"
            f"{fence}text\n{body}\n{fence}"
        )
    return Section(f"Text: {run.name}", [], [], [], notes)


def _training(runs: Sequence[RunFiles], out: pathlib.Path) -> Iterator[Section]:
    for run in runs:
        result = run.json("result.json")
        domains = list(next(iter(result["bits_per_byte"].values())))
        rows = [
            {
                "model": name,
                "updates": job["num_steps"],
                "cpu_seconds": result["cpu_seconds"].get(name),
                **result["bits_per_byte"][name],
            }
            for name, job in result["models"].items()
        ]
        columns = [
            *(Column("model", "model"), Column("updates", "updates")),
            Column("cpu_seconds", "CPU seconds", 0),
            *(Column(domain, domain, 3, "min") for domain in domains),
        ]
        note = f"{result['num_parameters']:,} parameters each; bits per byte of held-out text."
        curves = {"curves": _loss_curves(run)}
        label = {"y_label": "training loss (nats per token)"}
        drawn = draw(
            out, f"{run.name}_training.png", _plots.learning_curves, curves, **label
        )
        yield Section(f"Training of {run.name}", rows, columns, drawn, [note])


def _loss_curves(run: RunFiles) -> dict[str, Any]:
    curves = {}
    for folder in sorted((run.path / "training").glob("*/metrics.jsonl")):
        rows = RunFiles(folder.parent, run.kind, {}).metrics()
        rows = [row for row in rows if "loss" in row]
        if rows:
            curves[folder.parent.name] = {
                "step": [row["step"] for row in rows],
                "value": [row["loss"] for row in rows],
            }
    return curves


def _group_name(group: Sequence[RunFiles]) -> str:
    if len(group) == 1:
        return group[0].name
    name = re.sub(r"[-_]?seed[-_]?\d+$", "", group[0].name)
    return name or group[0].name


def _link(path: pathlib.Path, out: pathlib.Path) -> str:
    """From the report to a run's file, relative where it can be."""
    path, out = path.absolute(), out.absolute()
    return str(path.relative_to(out) if path.is_relative_to(out) else path)
