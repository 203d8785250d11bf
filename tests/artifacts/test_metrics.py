"""Metrics reach the disk at once, grow new names, and are cut where a run resumes."""

import csv
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.artifacts import metrics as metrics_lib


def _without_time(rows):
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def test_rows_are_on_the_disk_before_write_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics_lib.MetricWriter(path)
    writer.write(1, {"loss": jnp.float32(0.1), "count": np.int32(3), "plain": 0.5})
    # Not closed: another reader sees the row already, with the float32's exact value.
    (row,) = metrics_lib.read_metrics(path)
    assert row["loss"] == float(np.float32(0.1))
    assert (row["step"], row["count"], row["plain"]) == (1, 3, 0.5)
    writer.close()


def test_names_may_come_and_go_and_csv_has_them_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics_lib.MetricWriter(path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 0.5, "return": jnp.array([3.0, 4.0])})
        writer.write(3, {"return": jnp.array([5.0, 6.0])})
    header = metrics_lib.export_csv(path, tmp_path / "metrics.csv")
    assert header == ["step", "time", "loss", "return/0", "return/1"]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["loss"] for row in rows] == ["1.0", "0.5", ""]
    assert [row["return/1"] for row in rows] == ["", "4.0", "6.0"]


def test_numbers_that_are_not_finite_stay_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics_lib.MetricWriter(path) as writer:
        writer.write(1, {"a": jnp.nan, "b": jnp.array([-jnp.inf, 1.0])})

    def refuse(name):
        raise AssertionError(name)

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = metrics_lib.read_metrics(path)
    assert math.isnan(row["a"])
    assert row["b"] == [-math.inf, 1.0]


def test_a_resumed_run_repeats_no_row(tmp_path):
    def run(path, stop):
        with metrics_lib.MetricWriter(path) as writer:
            writer.truncate_after(20)
            for step in range(30, stop, 10):
                writer.write(step, {"loss": 1 / step})

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(whole, stop=70)
    run(killed, stop=60)  # then the kill; the newest checkpoint is that of step 20
    run(killed, stop=70)
    rows = _without_time(metrics_lib.read_metrics(killed))
    assert rows == _without_time(metrics_lib.read_metrics(whole))
    assert [row["step"] for row in rows] == [30, 40, 50, 60]


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics_lib.MetricWriter(path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})
    os.truncate(path, path.stat().st_size - 5)
    assert [row["step"] for row in metrics_lib.read_metrics(path)] == [1]
    with metrics_lib.MetricWriter(path) as writer:
        writer.write(3, {"loss": 3.0})
    assert [row["step"] for row in metrics_lib.read_metrics(path)] == [1, 3]


def test_a_damaged_line_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        metrics_lib.read_metrics(path)


def test_a_matrix_is_refused_and_leaves_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with metrics_lib.MetricWriter(path) as writer:
        with pytest.raises(ValueError, match=r"'w' has shape \(2, 2\)"):
            writer.write(1, {"w": jnp.ones((2, 2))})
        assert metrics_lib.read_metrics(path) == []


def test_tensorboard_has_the_same_numbers(tmp_path):
    record = pytest.importorskip("tensorboardX.record_writer")
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    assert record
    folder = tmp_path / "tensorboard"
    with metrics_lib.MetricWriter(tmp_path / "m.jsonl", tensorboard=folder) as writer:
        writer.write(1, {"loss": 0.5, "seeds": jnp.array([1.0, 2.0])})
        writer.write(2, {"loss": 0.25})
        writer.truncate_after(1)
        writer.write(2, {"loss": 0.75})
    seen, purged = [], []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            seen += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.HasField("session_log"):
                purged.append(event.step)
    assert sorted(seen) == [
        (1, "loss", 0.5),
        (1, "seeds/0", 1.0),
        (1, "seeds/1", 2.0),
        (2, "loss", 0.25),
        (2, "loss", 0.75),
    ]
    assert purged == [2]  # TensorBoard drops what came before from step 2 on
