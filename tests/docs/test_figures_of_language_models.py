"""Figures of language models that the pages quote are those of the files they name."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
STUDY = json.loads((RESULTS / "llm_study.json").read_text())["regimes"]
DECODE = json.loads((RESULTS / "llm_decode.json").read_text())["results"]
REGIMES = ("shared", "scratch")
COLUMNS = (("bits_per_byte", "mean"), ("bits_per_byte", "mixed"), ("accuracy", "mean"))

# What the rows of a page's table are called, and the methods in them.
EMFUSE = {
    "experts, each of three": ("expert 0", "expert 1", "expert 2"),
    "Soup": ("soup",),
    "RegMean": ("regmean",),
    "EMFuse, uniform": ("emfuse",),
    "EMFuse, weights from entropy, chosen on validation": ("entropy_adaptive",),
    "linear pool": ("linear_pool",),
    "PackLLM-sim, τ = 1; τ = 0.1": ("packllm_sim, τ=1", "packllm_sim, τ=0.1"),
    "PackLLM-opt": ("packllm_opt",),
    "EMSelect, tournament; nearest to the pool": (
        "emselect, tournament",
        "emselect, pool",
    ),
    "`evidence` (ours), default options; chosen on validation": (
        "evidence, defaults",
        "evidence",
    ),
    "one model of the same total compute on all text": ("generalist",),
}
README = {
    "fusion with weights from the text so far (`evidence`, ours)": ("evidence",),
    "PackLLM-opt, weights from the prompt": ("packllm_opt",),
    "EMFuse, uniform weights": ("emfuse",),
    "EMSelect, nearest to the pool": ("emselect, pool",),
    "RegMean; Soup is worse": ("regmean",),
    "who knows the domain of every token": ("own_expert",),
    "one model of the same total compute on all text": ("generalist",),
}


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def method_cell(regime, methods):
    """``2.39, 2.35; 2.74, 2.90; 0.42, 0.41``: methods within columns."""
    tables = STUDY[regime]["tables"]
    parts = (
        ", ".join(f"{tables[t]['values'][m][c]['estimate']:.2f}" for m in methods)
        for t, c in COLUMNS
    )
    return "; ".join(parts)


def difference(regime, table, method, column, sign=1, digits=2):
    """``0.23 (0.21 to 0.26)``: bits or answers above PackLLM-opt's, or below it."""
    found = STUDY[regime]["tables"][table]["difference_to"]["packllm_opt"]
    cell = found[method][column]
    low, high = sorted(sign * cell[side] for side in ("low", "high"))
    estimate = sign * cell["estimate"]
    return f"{estimate:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


@pytest.mark.parametrize(
    ("name", "rows"), [("docs/methods/emfuse.md", EMFUSE), ("README.md", README)]
)
def test_rows_of_the_study(name, rows):
    text = page(name)
    for label, methods in rows.items():
        cells = " | ".join(method_cell(regime, methods) for regime in REGIMES)
        assert f"| {label} | {cells} |\n" in text


def test_differences_to_packllm():
    text = " ".join(page("docs/methods/packllm.md").split())
    bits, right, long = "bits_per_byte", "accuracy", "bits_per_byte_long_prompt"
    for told in (
        (bits, "emfuse", "mean"),
        (bits, "emfuse", "mixed", -1),
        (bits, "ours", "mixed", -1),
        (bits, "ours", "mean", -1),
        (right, "ours", "mean", -1, 3),
        (long, "ours", "mean", 1, 3),
    ):
        shared, scratch = (difference(regime, *told) for regime in REGIMES)
        # Between the two there may be words such as "above" and "below".
        at = text.index(shared)
        if told != (bits, "emfuse", "mean"):
            assert scratch in text[at : at + 120], told
    assert STUDY["shared"]["seeds"]["0"]["chosen"]["ours"]["options"]["entropy_power"]


def test_selection_is_told_with_its_divergences_and_its_cost():
    text = page("docs/methods/emselect.md")
    for regime in REGIMES:
        found = [
            value
            for seed in STUDY[regime]["seeds"].values()
            for domain in seed["pool"].values()
            for value in domain["nats per token"]["kl"]
        ]
        assert f"{min(found):.2f} to {max(found):.2f}" in text
    costs = [
        study["ratio_of_emfuse_to"]["emselect"]["median"]
        for study in DECODE["beside_transformers"].values()
    ]
    *most, last = (f"{cost:.2f}" for cost in costs)
    assert f"{', '.join(most)} and {last} of its time" in text


def test_speeds_beside_transformers():
    big, big_8, small, small_8 = (
        f"{study['ratio_of_emfuse_to']['transformers']['median']:.1f}"
        for study in DECODE["beside_transformers"].values()
    )
    assert f"batch 1; 8 | {big}; {big_8} |" in page("README.md")
    assert f"batch 1; 8 | {small}; {small_8} |" in page("README.md")
    text = " ".join(page("docs/methods/emfuse.md").split())
    told = (
        f"{big} times as many tokens per second at 40 M parameters each and batch 1, "
    )
    assert (
        told + f"{big_8} times at batch 8, {small} times at 0.9 M and batch 1" in text
    )
