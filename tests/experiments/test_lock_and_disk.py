"""One run per directory, full disks and places that cannot be written."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap

import pytest

import _tiny_runs as tiny
import _toy_main as toy_main
from emfuse_jax import artifacts
from experiments import _lock, _run

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = toy_main.ToyConfig(run_dir="x")


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
    monkeypatch.setenv("EMFUSE_JAX_CACHE", "0")


def child(script, *arguments, **options):
    """A Python process with this process's devices, without which floats may differ."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **options)


HOLD = """
    import pathlib, sys, time
    from experiments import _lock
    lock = _lock.take(pathlib.Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_holder_is_named_and_a_dead_one_is_taken_over(tmp_path, capsys):
    process = child(HOLD, tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    who = f"process {process.pid} on {socket.gethostname()} since 20"
    try:
        with pytest.raises(ValueError, match="in use by another process") as caught:
            _run.open_run(tmp_path, CONFIG, kind="toy")
        assert who in str(caught.value)
        assert "--run_dir" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == [_lock.LOCK_FILE]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert _lock.owner(tmp_path).pid == process.pid
    with _run.open_run(tmp_path, CONFIG, kind="toy"):
        assert f"{who[:-4]}" in capsys.readouterr().err
        assert _lock.owner(tmp_path).pid == os.getpid()
    assert _lock.owner(tmp_path) is None


def test_another_host_may_still_be_at_work(tmp_path):
    record = tmp_path / _lock.LOCK_FILE
    record.write_text('{"pid": 1, "host": "node-17", "time": "2026-01-01T00:00:00"}')
    with pytest.raises(ValueError, match=r"process 1 on node-17 .*delete .*\.lock"):
        _lock.take(tmp_path)
    assert "node-17" in record.read_text()
    record.write_text('{"pid": 1, "ho')  # cut short: nobody holds it
    _lock.take(tmp_path).release()


def test_a_machine_is_known_by_its_boot_and_not_by_its_name_alone(
    tmp_path, monkeypatch
):
    """Renamed since, rebooted since, or another machine; with locks and without."""
    record = tmp_path / _lock.LOCK_FILE
    here, boot = socket.gethostname(), _lock._boot() or "a1"
    monkeypatch.setattr(_lock, "_boot", lambda: boot)
    living = os.getppid()
    for host, found, locks, free in (
        ("renamed", boot, True, True),
        ("renamed", boot, False, False),
        (here, "before", True, True),
        (here, "before", False, True),
        ("node-17", "before", True, False),
    ):
        text = f'{{"pid": {living}, "host": "{host}", "time": "", "boot": "{found}"}}'
        record.write_text(text)
        with monkeypatch.context() as patch:
            if not locks:
                patch.setattr(_lock, "_flock", lambda descriptor: None)
            if free:
                _lock.take(tmp_path).release()
            else:
                with pytest.raises(ValueError, match=f"process {living} on {host}"):
                    _lock.take(tmp_path)
    record.unlink()
    lock = _lock.take(tmp_path)
    assert _lock.owner(tmp_path).boot == boot
    lock.release()


def test_a_file_system_without_locks_goes_by_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(_lock, "_flock", lambda descriptor: None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    for pid, free in ((ended.pid, True), (os.getppid(), False)):
        record = f'{{"pid": {pid}, "host": "{host}", "time": "then"}}'
        (tmp_path / _lock.LOCK_FILE).write_text(record)
        if free:
            _lock.take(tmp_path).release()
        else:
            with pytest.raises(ValueError, match=f"process {pid} on {host}"):
                _lock.take(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_directory_without_the_right_to_write(capsys):
    folder = pathlib.Path(tempfile.mkdtemp())  # tmp_path's parents are the user's alone
    try:
        (folder / "locked").mkdir(mode=0o555)
        folder.chmod(0o755)
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write anywhere
        for name in ("locked", "locked/run"):
            argv = ["toy_main.py", f"--run_dir={folder}/{name}"]
            assert toy_main.main(argv) == 2
            error = " ".join(capsys.readouterr().err.split())
            assert "cannot be written" in error
            assert "--run_dir" in error
        assert list((folder / "locked").iterdir()) == []
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        shutil.rmtree(folder)


# A limit on the size of files is what a test may set: the writes fail as on a full disk.
FULL = """
    import resource, sys
    import _toy_main
    from experiments import _run

    run_dir = sys.argv[1]
    log, unlimited = _run.Run.log, resource.RLIM_INFINITY

    def limited(run, step, metrics):
        if step == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited))
        log(run, step, metrics)

    _run.Run.log = limited
    # In the metrics, in checkpoints.
    for at, size in ((5, 10), (20, 1000), (40, 1000)):
        print(_toy_main.main(["toy", f"--run_dir={run_dir}"]), flush=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    at = None
    print(_toy_main.main(["toy", f"--run_dir={run_dir}"]))
"""


def test_a_full_disk_loses_nothing(tmp_path):
    path = tmp_path / "run"
    process = child(FULL, path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, error = process.communicate()
    assert output.split() == ["2", "2", "2", "0"], error
    text = " ".join(error.split())
    assert "metrics.jsonl'. The disk (or a quota" in text
    for step, whole in ((20, "[10]"), (40, "[10, 20, 30]")):
        assert f"checkpoints/{step} could not be written" in text, error
        assert f"is whole (steps {whole})" in text
    assert text.count("it goes on from the last checkpoint") == 3
    assert toy_main.main(["toy_main.py", f"--run_dir={tmp_path}/whole"]) == 0
    assert tiny.rows_of(path) == tiny.rows_of(tmp_path / "whole")
    digests = [tiny.digests(p / "checkpoints") for p in (path, tmp_path / "whole")]
    assert digests[0] == digests[1]
    assert not list(path.rglob("*tmp*"))
    starts = artifacts.read_json(path / "provenance.json")["starts"]
    assert len(starts) == 4
