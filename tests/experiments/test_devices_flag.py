"""``--devices``: one run, on one device, on eight, and in two processes."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

import _tiny_runs as tiny
import _toy_main as toy_main
from emfuse_jax import artifacts
from experiments import _devices, _flags, _run, train_dynamics, train_lm_experts

TESTS = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _no_compilation_cache():
    os.environ["EMFUSE_JAX_CACHE"] = "0"
    yield
    del os.environ["EMFUSE_JAX_CACHE"]


def _main(path, *flags):
    return toy_main.main(["toy_main.py", f"--run_dir={path}", *flags])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "alone"
    assert _main(path) == 0
    return path


def assert_same_run(path, expected):
    rows, wanted = tiny.rows_of(path), tiny.rows_of(expected)
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    for row, right in zip(rows, wanted, strict=True):
        np.testing.assert_allclose([*row.values()], [*right.values()], rtol=1e-4)
    steps = [artifacts.steps(p / "checkpoints") for p in (path, expected)]
    assert steps[0] == steps[1]
    found = [artifacts.read_json(p / "result.json")["params"] for p in (path, expected)]
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_a_run_stopped_on_eight_devices_goes_on_on_one(alone, tmp_path, monkeypatch):
    path, check, updates = tmp_path / "run", _run.Run.check, []

    def signalled(run, step, *args):
        check(run, step, *args)
        if step == 15:
            os.kill(os.getpid(), signal.SIGTERM)

    def place(*args):
        placed = _place(*args)
        updates.append(placed[1].params.sharding)
        return placed

    _place = _devices.place
    monkeypatch.setattr(_devices, "place", place)
    with monkeypatch.context() as patch:
        patch.setattr(_run.Run, "check", signalled)
        assert _main(path, "--devices=all") == 75
    assert _main(path) == 0
    assert [len(sharding.device_set) for sharding in updates] == [8, 1]
    assert_same_run(path, alone)


STOPPED = """
import os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from experiments import _run
import _toy_main
check = _run.Run.check
def signalled(run, step, *args):
    check(run, step, *args)
    assert str(run.path).startswith(sys.argv[1]) == (jax.process_index() == 0)
    if jax.process_index() == 1 and step == 15:
        os.kill(os.getpid(), signal.SIGTERM)
_run.Run.check = signalled
flags = [f"--run_dir={sys.argv[1]}", f"--devices={sys.argv[2]}"]
sys.exit(_toy_main.main(["toy_main.py", *flags]))
"""


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(alone, tmp_path):
    """One of them is told to stop: both save, together, what eight devices go on from.

    The first is told where it is by its flag, the other one by what SLURM tells its jobs.
    """
    path = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "NPROC": "16",
    }
    slurm = {"JOB_ID": 1, "STEP_NODELIST": "127.0.0.1", "NTASKS": 2, "PROCID": 1}
    told = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    told |= {"SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": port}
    choices = {f"hosts,127.0.0.1:{port},2,0": {}, "hosts": told}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", STOPPED, str(path), choice],
            env=environment | cluster,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for choice, cluster in choices.items()
    ]
    logs = []
    try:
        logs = [host.communicate(timeout=180)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    assert [host.returncode for host in hosts] == [75, 75], "\n".join(logs)
    assert artifacts.steps(path / "checkpoints") == [10, 15]
    starts = artifacts.read_json(path / "provenance.json")["starts"]
    assert len(starts) == 1  # the first process's
    assert [row["step"] for row in tiny.rows_of(path)] == [5, 10, 15]
    assert _main(path, "--devices=all") == 0
    assert_same_run(path, alone)


@pytest.mark.parametrize(
    "choice", ["two", "one,2", "hosts,a:1", "hosts,a:1,2,x"], ids=str
)
def test_bad_choices_say_what_there_is(choice, tmp_path, capsys):
    assert _main(tmp_path / "run", f"--devices={choice}") == 2
    assert "one, all, hosts, or hosts,ADDRESS:PORT" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "run").exists()


def test_what_cannot_share_rows_has_no_such_flag(tmp_path, capsys):
    argv = ["train_lm_experts", f"--run_dir={tmp_path}/x", "--devices=all"]
    assert train_lm_experts.main(argv) == 2
    assert "devices" in capsys.readouterr().err


def test_the_slurm_example_is_a_script_whose_flags_exist():
    script = TESTS.parent / "slurm" / "train_dynamics.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text().replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    words = [word.strip('"') for word in line.split()]
    flags = words[words.index("experiments.train_dynamics") :]
    config = train_dynamics.TrainDynamicsConfig
    presets = train_dynamics.PRESETS
    parsed = _flags.parse(config, flags, presets=presets, trains=True, shares=True)
    assert parsed.devices == "hosts"
    # jax gives each task of a node one of its devices.
    (tasks,) = re.findall(r"--ntasks-per-node=(\d+)", text)
    (devices,) = re.findall(r"--gpus-per-node=(\d+)", text)
    assert tasks == devices
    assert parsed.config.adetm.batch_size % (2 * int(devices)) == 0
