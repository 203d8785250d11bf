"""Figures of device scaling that the page quotes are those of its file."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FOUND = json.loads((RESULTS / "device_scaling.json").read_text())["results"][
    "workloads"
]
ROWS = {
    "training step of an ETM": "training",
    "Langevin chains": "chains",
    "rollouts in two fused ADETMs": "rollouts",
}


def cost(row):
    return f"{row['cost']['median']:.2f}".removeprefix("0")


@pytest.mark.parametrize("label", ROWS)
def test_costs(label):
    kinds = FOUND[ROWS[label]]
    strong, weak = ([cost(row) for row in kinds[kind]] for kind in ("strong", "weak"))
    assert [row["devices"] for row in kinds["strong"]] == [1, 2, 4, 8]
    pairs = [f"{s} \\| {w}" for s, w in zip(strong[1:], weak[1:], strict=True)]
    page = (ROOT / "docs" / "guides" / "devices.md").read_text(encoding="utf-8")
    assert f"| {label} | {' | '.join([strong[0], *pairs])} |\n" in page
