"""The demo's jobs: their order, their resumption, their flags; and all of it, tiny."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from emfuse_jax import artifacts
from experiments import _flags, _progress, demo
from experiments._jobs import Job, run_jobs, single_thread

ROOT = pathlib.Path(__file__).parents[2]
WORKER = """
    import pathlib, sys, time
    log, makes, wait = sys.argv[1:4]
    with open(log, "a") as file: file.write(f"+{makes}\\n")
    time.sleep(float(wait))
    print("working on", makes)
    if len(sys.argv) > 4: sys.exit(3)
    pathlib.Path(makes).touch()
    with open(log, "a") as file: file.write(f"-{makes}\\n")
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Makes jobs that write when they begin and end into one log."""
    (tmp_path / "a_worker.py").write_text(textwrap.dedent(WORKER))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"

    def make(name, *needs, wait=0.0, fails=False):
        command = ("a_worker", str(log), str(tmp_path / name), str(wait))
        return Job(name, command + ("!",) * fails, tmp_path / name, needs)

    make.log = lambda: [
        line[0] + pathlib.Path(line[1:]).name for line in log.read_text().splitlines()
    ]
    return make


def run(jobs, folder, workers=2):
    stages = _progress.Stages(folder / "stages.json")
    run_jobs(jobs, folder, workers=workers, stage=stages.stage)
    return artifacts.read_json(folder / "stages.json")


def test_jobs_wait_for_what_they_need_and_share_the_workers(worker, tmp_path):
    jobs = [worker("a", wait=0.3), worker("b", wait=0.3), worker("c", "a", "b")]
    seconds = run(jobs, tmp_path)
    log = worker.log()
    assert sorted(log[:2]) == ["+a", "+b"]  # side by side
    assert log[-2:] == ["+c", "-c"]
    assert all(seconds[name] > 0.3 for name in "ab")
    assert "working on" in (tmp_path / "logs" / "c.log").read_text()


def test_one_worker_runs_the_first_of_the_list_first(worker, tmp_path):
    run([worker(name, wait=0.1) for name in "bac"], tmp_path, workers=1)
    assert worker.log() == ["+b", "-b", "+a", "-a", "+c", "-c"]


def test_what_succeeded_is_not_repeated_unless_what_it_needs_was(worker, tmp_path):
    jobs = [worker("a"), worker("b", "a"), worker("c")]
    run(jobs, tmp_path)
    before = worker.log()
    run(jobs, tmp_path)
    assert worker.log() == before
    (tmp_path / "a").unlink()
    run(jobs, tmp_path)
    assert worker.log()[len(before) :] == ["+a", "-a", "+b", "-b"]
    changed = [*jobs[:2], worker("c", wait=0.01)]
    run(changed, tmp_path)
    assert worker.log()[-2:] == ["+c", "-c"]
    assert len(worker.log()) == len(before) + 6


def test_a_failure_stops_the_others_and_names_the_log(worker, tmp_path):
    jobs = [worker("bad", wait=0.5, fails=True), worker("long", wait=60.0)]
    start = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"bad ended with status 3.*bad\.log"):
        run(jobs, tmp_path)
    assert time.monotonic() - start < 30
    assert "-long" not in worker.log()
    # What failed is tried again.
    run([worker("bad"), worker("long")], tmp_path)
    assert worker.log()[-1] in ("-bad", "-long")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own parent signal")
def test_a_killed_parent_takes_its_jobs_along(tmp_path):
    """Else the orphans would hold the run directories that a rerun wants to open."""
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, time\nfrom experiments._jobs import die_with_parent\n"
        "die_with_parent()\npathlib.Path('ready').touch()\ntime.sleep(3)\n"
        "pathlib.Path('survived').touch()\n"
    )
    parent = (
        "import contextlib, pathlib\nfrom experiments._jobs import Job, run_jobs\n"
        "here = pathlib.Path('.')\nrun_jobs([Job('child', ('child',), here / 'x')], here,"
        " workers=1, stage=lambda name: contextlib.nullcontext())\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    process = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env=environment
    )
    for _ in range(600):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(4)
    assert (tmp_path / "ready").exists()
    assert not (tmp_path / "survived").exists()


def test_a_job_has_one_thread_and_not_the_whole_accelerator():
    environment = single_thread({"XLA_FLAGS": "--mine", "HOME": "/h"})
    assert environment["XLA_FLAGS"] == "--mine --xla_cpu_multi_thread_eigen=false"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    kept = single_thread({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"})
    assert kept["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"


@pytest.mark.parametrize("preset", list(demo.PRESETS))
def test_every_planned_command_parses(preset, tmp_path):
    import importlib

    config = demo.PRESETS[preset]()
    jobs = demo.plan(config, tmp_path)
    known = set()
    for job in jobs:
        module = importlib.import_module(job.command[0])
        (config_cls,) = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and value.__module__ == module.__name__
            and value.__name__.endswith("Config")
        ]
        _flags.parse(
            config_cls,
            job.command,
            presets=getattr(module, "PRESETS", None),
            default_preset=None,
        )
        # A job only needs earlier ones, so the list can be run from its start.
        assert known >= set(job.needs)
        known.add(job.name)
    assert jobs[-1].name == "report"
    assert set(jobs[-1].needs) == known - {"report"}
    policies = [job for job in jobs if job.name.startswith("policy-")]
    assert len(policies) == 1 + len(config.policies)
    updates = {
        flag for job in policies for flag in job.command if "num_updates" in flag
    }
    assert updates == {f"--num_updates={config.policy_updates}"}
    # The report reads every run, and nothing that is none.
    (runs,) = (f for f in jobs[-1].command if f.startswith("--runs="))
    named = {pathlib.Path(path).name for path in runs[7:].split(",")}
    quick = {job.name for job in jobs if job.name.startswith(("data-", "behaviour-"))}
    assert named == known - quick - {"report"} | {tmp_path.name}


def test_either_part_can_be_had_alone(tmp_path):
    def names(*parts):
        return [job.name for job in demo.plan(demo.DemoConfig(parts=parts), tmp_path)]

    text = ["language-models", "language-scores", "language-text"]
    assert names("language") == [*text, "report"]
    dynamics = names("dynamics")
    assert set(names("dynamics", "language")) == {*text, *dynamics}
    assert len(set(dynamics)) == len(dynamics) == 11
    # Behaviours fill the gaps: nothing but the report needs them.
    assert names("dynamics", "language")[-4:-1] == [text[-1], *dynamics[-3:-1]]


def test_what_is_printed_at_the_end(tmp_path, capsys):
    report = (
        "# T\n\n## Returns\n\n| a |\n| - |\n\na note\n\n## Further ahead\n\n| b |\n\n"
        "## Bits per byte: x\n\n| c |\n"
    )
    assert (
        demo._tables(report) == "Returns\n\n| a |\n| - |\n\nBits per byte: x\n\n| c |"
    )
    passage = {
        "rule": "emselect",
        "moves": True,
        "prompt": "def",
        "token_texts": [" f", "(x)"],
        "log_probs": [-0.1, -0.2],
        "weights": [[1.0, 0.0], [0.0, 1.0]],
        "expert_log_probs": [[-1.0, -2.0], [-1.0, -2.0]],
    }
    result = {"experts": ["expert-py", "expert-man"], "passages": [passage]}
    (tmp_path / "language-text").mkdir()
    artifacts.write_json(tmp_path / "language-text" / "result.json", result)
    text = demo._decoded(tmp_path)
    assert text.startswith("emselect: py 50 %, man 50 % (colour: the expert of")
    assert text.endswith("def⟦py⟧ f⟦man⟧(x)")


def test_settings_that_cannot_work_are_refused(tmp_path, capsys):
    run_dir = f"--run_dir={tmp_path}/demo"
    for flag, words in (
        ("--policies=hopper_medium", "at least two to fuse"),
        ("--policies=a/x.npz,b/x.npz", "must differ"),
        ("--policies=hopper_medium,nobody", "no behaviour policy 'nobody'"),
        ("--env=ant", "known: hopper"),
        ("--workers=0", "at least 1"),
        ("--rules=emfus", "unknown fusion rule 'emfus'"),
        ("--parts=", "parts is empty; known: dynamics, language"),
        ("--parts=langage", "unknown part 'langage'; did you mean 'language'?"),
        ("--preset=fats", "unknown preset 'fats'"),
    ):
        assert demo.main(["demo", run_dir, flag]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_all_of_it_ends_with_a_report_and_a_rerun_repeats_nothing(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("EMFUSE_JAX_CACHE", str(tmp_path / "cache"))
    argv = ["demo", "--preset=smoke", f"--run_dir={tmp_path}/demo"]
    assert demo.main(argv) == 0
    text = capsys.readouterr().out
    assert "policy-fused" in text
    assert "packllm_sim:temperature=0.1" in text
    assert "⟦python⟧" in text
    assert f"report: {tmp_path}/demo/report.md" in text
    content = artifacts.read_json(tmp_path / "demo" / "report.json")
    assert len(content["sections"]["Returns"]) == 5
    methods = [
        r["method"] for r in content["sections"]["Bits per byte: language-scores"]
    ]
    assert methods[3:] == list(demo.PRESETS["smoke"]().rules)
    assert (tmp_path / "demo" / "language-text" / "text.html").exists()
    stages = {
        row["stage"]: row["seconds"]
        for row in content["sections"]["Seconds per stage"]
        if row["run"] == "demo"
    }
    assert set(stages) == {
        *("data-hopper_medium", "data-hopper_medium_late"),
        *("behaviour-hopper_medium", "behaviour-hopper_medium_late"),
        *("expert-hopper_medium", "expert-hopper_medium_late", "fused"),
        *("policy-hopper_medium", "policy-hopper_medium_late", "policy-fused"),
        *("language-models", "language-scores", "language-text"),
        "total",
    }
    before = (tmp_path / "demo" / "report.json").stat().st_mtime_ns
    assert demo.main(argv) == 0
    assert (tmp_path / "demo" / "report.json").stat().st_mtime_ns == before
