import doctest
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _tables
from experiments._tables import Column, format_cell, markdown_table, write_table

COLUMNS = [
    Column("method", "method"),
    Column("score", "return", digits=1, best="max"),
    Column("error", "error", digits=3, best="min"),
]
ROWS = [
    {
        "method": "fused",
        "score": {"mean": 52.13, "interval": [49.0, 55.5], "per_seed": [1, 2]},
        "error": 0.0961,
        "curve": np.array([1.0, np.nan]),
    },
    {"method": "expert 1", "score": {"mean": 41.0, "interval": None}, "error": None},
    {"method": "a | b", "score": None, "error": jnp.float32(0.2)},
]


def test_means_come_with_their_intervals_and_the_best_is_bold():
    lines = markdown_table(ROWS, COLUMNS).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[2].strip() == "return"
    assert [set(rule.strip()) for rule in lines[1].split("|")[1:-1]] == [{":", "-"}] * 3
    assert lines[1].split("|")[2].strip().endswith("-:")
    cells = [[c.strip() for c in line.split(" | ")] for line in lines[2:]]
    assert cells[0] == ["| fused", "**52.1 [49.0, 55.5]**", "**0.096** |"]
    assert cells[1] == ["| expert 1", "41.0", "–         |"]
    assert cells[2][0] == "| a \\| b"


def test_numbers_that_are_none_do_not_win():
    rows = [{"error": float("nan")}, {"error": 2.0}, {"error": -np.inf}]
    column = Column("error", "error", best="min")
    text = markdown_table(rows[:2], [column])
    assert "**2.00**" in text
    assert "n/a" in text
    assert "-∞" in markdown_table(rows, [column])
    assert "**" not in markdown_table(rows[:1], [column])


def test_both_files_are_written_whole(tmp_path):
    notes = ["95 % intervals by resampling seeds, then episodes."]
    markdown, plain = write_table(
        tmp_path / "run.v1" / "report", ROWS, COLUMNS, title="Hopper", notes=notes
    )
    assert markdown.name == "report.md"
    assert markdown.read_text().startswith("## Hopper\n\n| method")
    assert notes[0] in markdown.read_text()
    content = json.loads(plain.read_text())
    assert content["rows"][0]["score"]["per_seed"] == [1, 2]
    assert content["rows"][0]["curve"] == [1.0, None]
    assert content["rows"][2]["error"] == pytest.approx(0.2)
    assert content["columns"][1] == {
        "key": "score", "title": "return", "digits": 1, "best": "max",
    }  # fmt: skip
    assert len(list(markdown.parent.iterdir())) == 2


def test_errors_leave_files_alone(tmp_path):
    for rows in ([], [{"other": 1}]):
        with pytest.raises(ValueError, match="method"):
            write_table(tmp_path / "report", rows, COLUMNS, title="t")
    with pytest.raises(ValueError, match="best='low'"):
        markdown_table(ROWS, [Column("error", "error", best="low")])
    assert not list(tmp_path.iterdir())


def test_cells():
    assert format_cell(True) == "True"
    assert format_cell(np.int64(7)) == "7"
    assert format_cell(np.float32(0.126)) == "0.13"
    assert doctest.testmod(_tables).failed == 0
