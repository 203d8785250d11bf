"""SIGTERM ends a run at a chunk's end, saved; the same command goes on bit for bit."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import _tiny_runs as tiny
import _toy_main as toy_main
from emfuse_jax import artifacts
from experiments import _jobs, _run, _stopping


@pytest.fixture(scope="module", autouse=True)
def _no_compilation_cache():
    os.environ["EMFUSE_JAX_CACHE"] = "0"
    yield
    del os.environ["EMFUSE_JAX_CACHE"]


def _main(path):
    return toy_main.main(["toy_main.py", f"--run_dir={path}"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert _main(path) == 0
    return path


@pytest.mark.parametrize("stops", [(15,), (30,), (25, 35), (40,)])
def test_stopped_and_resumed_equals_uninterrupted(
    whole, tmp_path, monkeypatch, capsys, stops
):
    """Between planned checkpoints (every 10 steps), at one, twice in a row, and in the
    last chunk, after which there is still a result to write."""
    path, log = tmp_path / "run", _run.Run.log
    left = list(stops)

    def signalled(run, step, metrics):
        log(run, step, metrics)
        if left and step == left[0] - 5:
            os.kill(os.getpid(), signal.SIGTERM)  # heard at the end of the next chunk

    monkeypatch.setattr(_run.Run, "log", signalled)
    while left:
        assert _main(path) == _stopping.EXIT_STATUS == 75
        error = capsys.readouterr().err
        assert f"stopped by SIGTERM at step {left[0]} of 40, which is saved" in error
        assert "the same command resumes" in error
        assert max(artifacts.steps(path / "checkpoints")) == left.pop(0)
        assert not (path / "result.json").exists()
    assert _main(path) == 0
    assert tiny.rows_of(path) == tiny.rows_of(whole)
    assert tiny.digests(path / "checkpoints") == tiny.digests(whole / "checkpoints")
    assert (path / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_comes_while_the_end_is_saved_is_heard(
    whole, tmp_path, monkeypatch, capsys
):
    path, save = tmp_path / "run", artifacts.save

    def signalled(folder, step, *args, **options):
        save(folder, step, *args, **options)
        if step == 40:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "save", signalled)
        assert _main(path) == 75
    assert "at step 40 of 40, which is saved" in capsys.readouterr().err
    assert _main(path) == 0
    assert (path / "result.json").read_bytes() == (whole / "result.json").read_bytes()


def test_a_later_signal_does_not_wait():
    script = (
        "import time; from experiments import _stopping\n"
        "with _stopping.until_asked() as asked:\n"
        "    print('ready', flush=True)\n"
        "    _stopping._PATIENCE = 0.0\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    for wait in (0.2, 0.0):
        process.send_signal(signal.SIGTERM)
        time.sleep(wait)
    assert process.wait() == -signal.SIGTERM
    assert b"SIGTERM: stopping at" in process.stderr.read()
    process.communicate()


def test_other_threads_have_no_signals():
    found = []

    def body():
        with _stopping.until_asked() as asked:
            found.append(asked())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [False]


def test_the_signal_may_come_in_the_middle_of_a_write(monkeypatch, capfd):
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")

    with _stopping.until_asked() as asked:
        monkeypatch.setattr(sys, "stderr", Busy())
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.undo()
        assert asked()
    assert "SIGTERM: stopping at" in capfd.readouterr().err


@pytest.mark.parametrize("status", [1, 75])
def test_jobs_that_the_signal_reached_first_have_not_failed(
    tmp_path, monkeypatch, status
):
    """Schedulers signal the jobs as well; 75 says so even where this process has none."""
    lines = ["import os, signal, sys"]
    if status == 1:
        lines.append("os.kill(os.getppid(), signal.SIGTERM)")
    (tmp_path / "ended_job.py").write_text("\n".join([*lines, f"sys.exit({status})"]))
    (tmp_path / "slow_job.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = [_jobs.Job(n, (f"{n}_job",), tmp_path / "never") for n in ("ended", "slow")]
    stages = _run.Stages(tmp_path / "stages.json")
    with pytest.raises(_stopping.StoppedError):
        _jobs.run_jobs(jobs, tmp_path, workers=2, stage=stages.stage)


def test_a_job_that_diverged_is_told_apart_and_options_are_no_other_job(
    tmp_path, monkeypatch
):
    script = "import sys; sys.exit(3 if len(sys.argv) < 2 else 0)"
    (tmp_path / "wild_job.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = _jobs.Job("wild", ("wild_job",), tmp_path)
    options = {"workers": 1, "stage": _run.Stages(tmp_path / "stages.json").stage}
    with pytest.raises(ChildProcessError, match="diverged: --on_divergence=rollback"):
        _jobs.run_jobs([job], tmp_path, **options)
    calmed = job._replace(options=("--on_divergence=rollback",))
    assert not _jobs.succeeded([calmed], tmp_path / _jobs.RECORD_FILE)
    _jobs.run_jobs([calmed], tmp_path, **options)
    assert _jobs.succeeded([job], tmp_path / _jobs.RECORD_FILE)


def test_jobs_are_stopped_too_and_may_save_first(tmp_path, monkeypatch):
    saves = (
        "import signal, sys, time\n"
        "def handler(*_):\n"
        f"    open({str(tmp_path / 'saved')!r}, 'w').close(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, handler)\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "slow_job.py").write_text(saves)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = [_jobs.Job("slow", ("slow_job",), tmp_path / "never")]

    def signal_when_ready():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_when_ready).start()
    stages = _run.Stages(tmp_path / "stages.json")
    with pytest.raises(_stopping.StoppedError, match="with 1 jobs left"):
        _jobs.run_jobs(jobs, tmp_path, workers=1, stage=stages.stage)
    assert (tmp_path / "saved").exists()
