"""Figures of Particle and Push-T that the pages quote are those of their files."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
STUDY = json.loads((RESULTS / "particle.json").read_text())
DIMENSIONS = ("1", "2", "4", "8", "16")

# What the rows of the page's tables are called, and the ways to act in them.
ROWS = {
    "implicit cloning, Langevin": ("ibc", "langevin"),
    "implicit cloning, population": ("ibc", "derivative_free"),
    "EBT-Policy, 2 steps": ("ebt", "2 steps"),
    "EBT-Policy, 10 steps": ("ebt", "10 steps"),
    "diffusion, 2 steps": ("diffusion", "2 steps"),
    "diffusion, 15 steps": ("diffusion", "15 steps"),
    "diffusion, 100 steps": ("diffusion", "100 steps"),
    "regression": ("mse", "forward"),
    "regression of chunks": ("mse_chunks", "forward"),
}


def page():
    return (ROOT / "docs" / "methods" / "ibc.md").read_text(encoding="utf-8")


def shares(found):
    """``0.95``: published episodes; ``0.87, 0.84``: longer ones, without and with a push."""
    success, long, pushed = (
        f"{found[case]['share']:.2f}" for case in ("success", "long", "pushed")
    )
    return success, f"{long}, {pushed}"


def row(method, variant):
    """The cells of a way to act: all dimensions, and the milliseconds of an action."""
    table = STUDY["results"]["by_dimension"]
    found = [shares(table[d][method]["variants"][variant]) for d in DIMENSIONS]
    times = [
        f"{of[f'{method} {variant}']['cpu_ms_per_executed_action']:.2f}"
        for of in STUDY["results"]["time_per_action"].values()
    ]
    return [cells[0] for cells in found], [cells[1] for cells in found], times


@pytest.mark.parametrize("label", ROWS)
def test_rows_of_the_study(label):
    success, recovery, times = row(*ROWS[label])
    assert f"| {label} | {' | '.join(success)} | {'; '.join(times)} |\n" in page()
    assert f"| {label} | {' | '.join(recovery)} |\n" in page()


def test_push_t():
    found = json.loads((RESULTS / "pusht.json").read_text())["results"]
    expert, clone = found["expert"], found["diffusion"]
    told = " ".join(page().split())
    assert (
        f"in {100 * expert['success']['share']:.0f} of 100 episodes, "
        f"{expert['mean_best_coverage']:.2f} of it on average" in told
    )
    assert f"cloned from {found['rows']} of its steps" in told
    assert (
        f"covers {clone['mean_best_coverage']:.2f} and succeeds in "
        f"{100 * clone['success']['share']:.0f} of 100" in told
    )
