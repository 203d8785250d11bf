"""Run directories resume bit for bit, and refuse what is not theirs."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import _toy_main as toy_main
from emfuse_jax import artifacts
from experiments import _compiling, _progress, _run

ROOT = pathlib.Path(__file__).parents[2]


def _main(run_dir, *flags):
    return toy_main.main(["toy_main.py", f"--run_dir={run_dir}", *flags])


def _rows(run_dir):
    rows = artifacts.read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def _snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module", autouse=True)
def _no_compilation_cache():
    os.environ["EMFUSE_JAX_CACHE"] = "0"
    yield
    del os.environ["EMFUSE_JAX_CACHE"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert _main(path) == 0
    return path


def test_what_a_run_leaves(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        ".lock",
        *("config.json", "provenance.json", "metrics.jsonl", "stages.json"),
        *("result.json", "tensorboard", "checkpoints"),
    }
    config = artifacts.read_json(whole / "config.json")
    assert config["kind"] == "toy"
    assert config["config"]["learning_rate"] == 0.05
    facts = artifacts.read_json(whole / "provenance.json")
    assert (facts["seed"], len(facts["starts"])) == (0, 1)
    assert facts["versions"]["jax"] == jax.__version__
    assert len(facts["devices"]) == 8
    assert artifacts.read_json(whole / "stages.json")["fit"] > 0
    assert [row["step"] for row in _rows(whole)] == list(range(5, 45, 5))
    assert artifacts.steps(whole / "checkpoints") == [20, 30, 40]
    best = max((r for r in _rows(whole) if "score" in r), key=lambda r: r["score"])
    assert artifacts.best_step(whole / "checkpoints") == best["step"]


@pytest.mark.parametrize("kill_at", [20, 40])
def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path, kill_at):
    path = tmp_path / "killed"
    command = [sys.executable, str(pathlib.Path(toy_main.__file__))]
    command += [f"--run_dir={path}", f"--kill_at={kill_at}"]
    # The devices and threads of this process, without which floats may differ.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not (path / "result.json").exists()
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 45, "time": 0, "loss": 9}) + "\n" + '{"st')
    assert _main(path) == 0
    assert _rows(path) == _rows(whole)
    assert (path / "result.json").read_bytes() == (whole / "result.json").read_bytes()
    digests = [
        [
            artifacts.read_meta(p / "checkpoints", step)["digest"]
            for step in artifacts.steps(p / "checkpoints")
        ]
        for p in (path, whole)
    ]
    assert digests[0] == digests[1]
    assert len(artifacts.read_json(path / "provenance.json")["starts"]) == 2


def test_another_seed_would_have_shown(whole, tmp_path):
    assert _main(tmp_path / "other", "--seed=1") == 0
    assert _rows(tmp_path / "other") != _rows(whole)


def test_a_finished_run_is_left_as_it_is(whole, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    before = _snapshot(copy / "checkpoints")
    assert _main(copy) == 0
    assert _snapshot(copy / "checkpoints") == before
    assert _rows(copy) == _rows(whole)


def test_a_damaged_checkpoint_costs_only_time(whole, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "checkpoints" / "40" / "meta" / "metadata").write_text("")
    assert _main(copy) == 0
    assert "checkpoint 40 was damaged" in capsys.readouterr().err
    assert _rows(copy) == _rows(whole)


def test_another_config_is_refused_by_name(whole, capsys):
    before = _snapshot(whole)
    assert _main(whole, "--learning_rate=0.1", "--num_steps=50") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "learning_rate: 0.05 ≠ 0.1" in error
    assert "num_steps: 40 ≠ 50" in error
    assert "Traceback" not in error
    assert _snapshot(whole) == before


def test_another_command_is_refused(whole):
    with pytest.raises(ValueError, match="a run of 'toy', not of 'evaluate'"):
        _run.open_run(whole, toy_main.ToyConfig(run_dir="x"), kind="evaluate")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("thesis.tex", "do not lose me", "not empty and no run directory"),
        ("config.json", '{"model_type": "llama"}', "was not written by this package"),
        ("config.json", '{"kind": ', "was not written by this package"),
    ],
)
def test_a_foreign_folder_is_refused_and_untouched(tmp_path, capsys, name, text, words):
    (tmp_path / name).write_text(text)
    before = _snapshot(tmp_path)
    assert _main(tmp_path) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert _snapshot(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert _main(tmp_path / "file") == 2
    assert "is a file" in " ".join(capsys.readouterr().err.split())
    assert _main(tmp_path / "file" / "below") == 2
    # Long paths wrap the text.
    assert "cannot be written" in " ".join(capsys.readouterr().err.split())
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if not os.access(locked, os.W_OK):  # root may write anywhere
        assert _main(locked / "run") == 2
        assert "cannot be written" in " ".join(capsys.readouterr().err.split())


def test_two_processes_cannot_share_a_run(tmp_path):
    config = toy_main.ToyConfig(run_dir="x")
    with (
        _run.open_run(tmp_path / "run", config, kind="toy"),
        pytest.raises(ValueError, match="in use by another process"),
    ):
        _run.open_run(tmp_path / "run", config, kind="toy")
    with _run.open_run(tmp_path / "run", config, kind="toy") as run:
        assert run.resumed


def test_a_start_killed_before_its_config_was_written_is_no_foreign_folder(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.abc").write_text("{")
    with _run.open_run(tmp_path, toy_main.ToyConfig(run_dir="x"), kind="toy") as run:
        assert not run.resumed


def test_bad_input_exits_2_with_one_paragraph(tmp_path, capsys):
    for kind in ("ValueError", "FileNotFoundError"):
        assert _main(tmp_path / "run", f"--fail={kind}") == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"error: {kind} on purpose" in error
        assert "Traceback" not in error
    with pytest.raises(ValueError, match="on purpose"):
        _main(tmp_path / "run", "--fail=ValueError", "--traceback")
    # A mistake of ours is not the user's: it keeps its traceback.
    with pytest.raises(ZeroDivisionError):
        _main(tmp_path / "run", "--fail=ZeroDivisionError")
    assert _main(tmp_path / "run", "--fail=KeyboardInterrupt") == 130
    assert _main(tmp_path / "run", "--learning_rat=1") == 2
    assert "Did you mean" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_help_exits_0(capsys):
    assert toy_main.main(["toy_main.py", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Fits a line to noisy data" in text
    assert "--learning_rate=0.05" in text


def test_stages_add_up_over_starts(tmp_path):
    path = tmp_path / "stages.json"
    for _ in range(2):
        stages = _progress.Stages(path)
        with stages.stage("outer"), stages.stage("inner"):
            stages._open["inner"] -= 10
            stages._open["outer"] -= 20
            stages.flush()
    seconds = artifacts.read_json(path)
    assert 20 <= seconds["inner"] < 21
    assert 40 <= seconds["outer"] < 41
    with (
        stages.stage("outer"),
        pytest.raises(ValueError, match="already open"),
        stages.stage("outer"),
    ):
        pass


def test_progress_prints_plain_lines_without_a_terminal(capsys):
    with _progress.Progress(100, initial=50, interval=0.0, description="fit") as bar:
        bar.update(60, {"loss": 0.123456, "seeds": [1, 2]})
    line = capsys.readouterr().err
    assert line.startswith("fit: 60/100 steps")
    assert "loss=0.1235" in line
    assert "seeds" not in line
    with _progress.Progress(100, interval=1e9) as bar:
        bar.update(60)
        assert capsys.readouterr().err == ""
        bar.update(100)
        assert "100/100" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "expected"), [("0", None), ("/x/y", "/x/y")])
def test_the_compilation_cache_can_be_moved_and_switched_off(
    monkeypatch, value, expected
):
    monkeypatch.setenv("EMFUSE_JAX_CACHE", value)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    try:
        # Another test's command may have switched it on in this process.
        jax.config.update("jax_compilation_cache_dir", None)
        _compiling.use_cache()
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
