"""The guidance benchmark's closed forms hold at tiny sizes, and its picture is drawn."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import _guidance, guidance_toys
from experiments._run import run_main

TINY = dataclasses.replace(
    guidance_toys.GuidanceToysConfig(), samples=2000, exact_steps=30
)


@pytest.mark.allow_key_reuse
def test_the_first_order_form_misses_a_sharp_goal_and_the_second_order_one_hits(
    monkeypatch,
):
    monkeypatch.setattr(guidance_toys, "STRENGTHS", (2.0,))
    (row,) = guidance_toys.exact_quadratic(TINY)
    np.testing.assert_allclose(row["target"]["mean"], 0.8 * 2 / 3)
    assert abs(row["second_order"]["mean"] - row["target"]["mean"]) < 0.03
    assert abs(row["second_order"]["std"] - row["target"]["std"]) < 0.02
    assert abs(row["first_order"]["mean"] - row["target"]["mean"]) > 0.1


def test_the_document_is_written_and_the_fields_are_drawn(tmp_path, monkeypatch):
    """The trained parts are minutes of compiling; they are stood in for here."""
    ticks = np.linspace(-1, 1, 3)
    flat = np.ones((3, 3))
    fields = {
        "exact": {
            "x": ticks,
            "y": ticks,
            "u": flat,
            "v": -flat,
            "actions": np.zeros((5, 2)),
            "title": "exact",
        }
    }
    rows = {"split": {"guided": [{"total_variation": 0.01}]}}
    for name in guidance_toys.PARTS:
        monkeypatch.setattr(guidance_toys, name, lambda config: {"mean": 0.5})
    monkeypatch.setattr(guidance_toys, "trained_eight", lambda config: (rows, fields))
    output, figure = tmp_path / "toys.json", tmp_path / "toys.png"
    argv = ["guidance_toys", "--smoke", f"--output={output}", f"--figure={figure}"]
    config = guidance_toys.GuidanceToysConfig
    assert run_main(guidance_toys.main, config, argv) == 0
    document = json.loads(output.read_text())
    assert document["question"].startswith("Is energy guidance exact")
    assert list(document["results"]) == list(guidance_toys.PARTS)
    assert document["results"]["trained_eight"]["result"] == rows
    assert figure.stat().st_size > 1000
    # One part alone leaves the others as they were.
    monkeypatch.setattr(guidance_toys, "exact_linear", lambda config: {"mean": 0.7})
    argv = [*argv[:-1], "--parts=exact_linear"]
    assert run_main(guidance_toys.main, config, argv) == 0
    after = json.loads(output.read_text())["results"]
    assert after.pop("exact_linear")["result"] == {"mean": 0.7}
    assert after == {k: document["results"][k] for k in guidance_toys.PARTS[1:]}


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="expected some of exact_linear"):
        guidance_toys.GuidanceToysConfig(parts=("exact",))


def test_the_eight_modes_are_told_apart():
    found = _guidance.nearest_mode(_guidance.CENTERS + 0.3)
    np.testing.assert_array_equal(found, np.arange(8))
