"""The Push-T script records, measures and writes."""

import json

import pytest

from benchmarks import pusht
from experiments._run import run_main

pytest.importorskip("gym_pusht")


def test_the_script_records_and_measures(tmp_path):
    argv = [
        "pusht",
        "--demonstrations=1",
        "--episodes=1",
        "--num_steps=0",
        "--seed=3",
        f"--data={tmp_path / 'data.hdf5'}",
        f"--output={tmp_path / 'pusht.json'}",
    ]
    assert run_main(pusht.main, pusht.PushTConfig, argv) == 0
    results = json.loads((tmp_path / "pusht.json").read_text())["results"]
    assert results["expert"]["success"]["share"] == 1.0
    assert results["expert"]["mean_best_coverage"] > 0.95
    assert results["rows"] < 300
