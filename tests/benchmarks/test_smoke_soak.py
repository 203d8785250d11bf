"""The soak scripts run, and see what they are there to see."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest

from benchmarks import _run_contents, soak_kill
from emfuse_jax import artifacts

ROOT = pathlib.Path(__file__).parents[2]

# Readers that do what none may do, beside the real ones.
PLANTED = """
    import json, os, sys, time
    from benchmarks import _readers as readers, soak_readers

    def planted(act):
        def read(path):
            if path.read_bytes() == b"whole":
                return
            act()
        return readers.Reader(lambda: [b"whole"], lambda rng, data: b"bad", read, "x")

    def flood():
        return bytearray(2**31)

    def escape():
        raise KeyError("ours it is not")

    readers.READERS |= {
        "abort": planted(os.abort), "hang": planted(lambda: time.sleep(60)),
        "flood": planted(flood), "escape": planted(escape),
    }
    config = soak_readers.SoakConfig(inputs=2, output=sys.argv[1], seconds=0.7)
    names = ("abort", "hang", "flood", "escape")
    found = {name: soak_readers._soak_reader(name, config).counts for name in names}
    print("planted", json.dumps(found), flush=True)
    for name in names:
        del readers.READERS[name]
    soak_readers.soak(soak_readers.SoakConfig(inputs=150, output=sys.argv[1]))
"""


def test_readers_survive_and_planted_faults_are_counted(tmp_path):
    output = tmp_path / "readers.json"
    command = [sys.executable, "-c", textwrap.dedent(PLANTED), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("planted ")]
    assert json.loads(line.removeprefix("planted ")) == {
        "abort": {"crash": 2},
        "hang": {"hang": 2},
        "flood": {"memory": 2},
        "escape": {"escaped KeyError": 2},
    }
    assert (tmp_path / "readers" / "abort-1").read_bytes() == b"bad"
    results = json.loads(output.read_text())["results"]
    assert {
        "hdf5",
        "npz",
        "safetensors",
        "hf_config",
        "tokenizer",
        "run_config",
    } <= set(results)
    for name, result in results.items():
        assert result["inputs"] == 150
        assert result["failed"] == 0, (name, result["examples"])
        assert result["outcomes"]["refused"] > 30, name


@pytest.fixture
def two_runs(tmp_path):
    """Directories that differ in nothing that counts."""
    for name in ("first", "second"):
        folder = tmp_path / name
        artifacts.save(folder / "checkpoints", 3, {"x": np.float32(1)})
        artifacts.write_json(
            folder / "result.json",
            {"loss": 1.0, "cpu_seconds": name, "from": str(folder)},
        )
        with artifacts.MetricWriter(folder / "metrics.jsonl") as writer:
            writer.write(5, {"loss": 0.5})
        with h5py.File(folder / "data.hdf5", "w") as file:
            file["x"] = np.arange(3)
        (folder / ".lock").write_text(name)
    return tmp_path / "first", tmp_path / "second"


def _different(first, second):
    return artifacts.differences(*map(_run_contents.contents, (first, second)))


def test_what_counts_is_compared_and_what_does_not_is_not(two_runs):
    first, second = two_runs
    assert _different(first, second) == []
    assert _run_contents.newest_steps(first) == {".": (5, 3)}
    with h5py.File(second / "data.hdf5", "r+") as file:
        file["x"][1] = 9
    artifacts.delete(second / "checkpoints", 3)
    artifacts.save(second / "checkpoints", 3, {"x": np.float32(2)})
    artifacts.write_json(second / "result.json", {"loss": 1.5, "from": str(second)})
    words = " ".join(_different(first, second))
    for part in ("data.hdf5.x", "checkpoints/3", "result.json.loss"):
        assert part in words
    shutil.rmtree(second / "checkpoints")
    assert "absent" in " ".join(_different(first, second))


def test_a_stage_is_killed_and_compared(tmp_path):
    config = soak_kill.KillConfig(
        stages=("data",),
        kills=2,
        seed=3,  # after an eighth and a quarter of the time: not when all is done
        folder=str(tmp_path / "runs"),
        output=str(tmp_path / "kill.json"),
    )
    document = soak_kill.soak(config)
    result = document["results"]["data"]
    assert document["equal"], result
    assert result["kills"] >= 1
    assert result["files_compared"] == 1


def test_stages_that_are_needed_are_run_and_others_not():
    needed = {
        name for name in soak_kill._NAMES if soak_kill._is_needed(name, ("evaluated",))
    }
    assert needed == {"data", "expert_a", "policy", "evaluated"}
    with pytest.raises(ValueError, match="did you mean 'fused'"):
        soak_kill.KillConfig(stages=("fusd",))
