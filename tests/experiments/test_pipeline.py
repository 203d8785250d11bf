"""Every command line once, tiny: what it leaves, one trace each, kill -9 in each."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import _tiny_runs as tiny
from emfuse_jax import artifacts
from emfuse_jax.data.d4rl_reader import read_arrays
from experiments import (
    collect_data,
    evaluate,
    fuse_dynamics,
    report,
    train_dynamics,
    train_policy,
)

ROOT = pathlib.Path(__file__).parents[2]
COLLECT = ("--steps=400", "--num_envs=2", "--policy=random")


def train_flags(root, name):
    return (f"--data={root}/{name}.hdf5", f"--run_dir={root}/{name}", *tiny.MODEL)


def policy_flags(root, name):
    return (
        *(f"--model={root}/fused", "--env=hopper", f"--run_dir={root}/{name}"),
        *(*tiny.POLICY, "--num_seeds=2"),
    )


def command(module, *flags):
    """A command line in this process; it must succeed."""
    assert module.main([module.__name__, *flags]) == 0


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_shared_with_the_killed_processes(tmp_path_factory):
    before = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("EMFUSE_JAX_CACHE", str(folder))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def traces():
    """How often each command traced what it compiles."""
    return {}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, traces):
    """Random Hopper data, two experts, their fusion, two seeds of a policy in it, and the
    report."""
    root = tmp_path_factory.mktemp("pipeline")

    def counted(name, module, *flags):
        with tiny.TraceCounts() as traces[name]:
            command(module, *flags)

    for seed, name in enumerate(("slow", "fast")):
        out = f"--out={root}/{name}.hdf5"
        command(collect_data, *COLLECT, out, f"--seed={seed}")
        counted(name, train_dynamics, *train_flags(root, name))
    experts = f"--experts={root}/slow,{root}/fast"
    command(fuse_dynamics, experts, f"--run_dir={root}/fused")
    counted("policy", train_policy, *policy_flags(root, "policy"))
    behaviour = (f"--out={root}/random.json", "--policy=random", "--env=hopper")
    command(evaluate, *behaviour, "--episodes=4")
    command(evaluate, f"--run_dir={root}/policy", "--episodes=3", "--stochastic")
    runs = ",".join(f"{root}/{n}" for n in ("slow", "fast", "fused", "policy"))
    sources = (f"--runs={runs}", f"--behaviour={root}/random.json")
    command(report, *sources, f"--out={root}/report")
    return root


def test_each_run_leaves_what_it_says(pipeline):
    common = {"config.json", "provenance.json", "stages.json", "checkpoints", ".lock"}
    trained = common | {"metrics.jsonl", "tensorboard", "model.json"}
    left = {
        name: {path.name for path in (pipeline / name).iterdir()}
        for name in ("slow", "fused", "policy")
    }
    assert left["slow"] == trained | {"result.json"}
    assert left["fused"] >= common | {"model.json", "fusion.json"}
    assert left["policy"] == trained | {"result.json", "evaluation.json", "policy"}
    for name in left:
        assert list((pipeline / name / "tensorboard").glob("*")) or name == "fused"
    assert [row["step"] for row in tiny.rows_of(pipeline / "slow")] == [5, 10, 15, 20]
    curve = [r for r in tiny.rows_of(pipeline / "policy") if "normalized_return" in r]
    assert [row["update"] for row in curve] == [10, 20]
    assert all(r["return_low"] <= r["normalized_return"] for r in curve)


def test_a_learner_is_traced_once(pipeline, traces):
    chunks = {name: counts["run_chunk"] for name, counts in traces.items()}
    assert chunks == {"slow": 1, "fast": 1, "policy": 1}
    assert traces["slow"]["error"] == 1  # the validation, tried twice
    assert traces["policy"]["act"] == 1  # the evaluation, tried twice


def test_fusion_json_holds_every_expert_domain_and_rule(pipeline):
    result = artifacts.read_json(pipeline / "fused" / "fusion.json")
    assert [pathlib.Path(d).stem for d in result["domains"]] == ["slow", "fast"]
    assert list(result["fused"]) == ["uncertainty", "uniform"]
    assert [row["own"] for row in result["experts"].values()] == [
        [True, False],
        [False, True],
    ]
    for row in (*result["experts"].values(), *result["fused"].values()):
        assert len(row["one_step"]) == len(row["k_step"]) == 2
        assert -1 <= row["spearman"] <= 1
    # One step open loop is one step; only the rows differ.
    row = result["fused"]["uniform"]
    np.testing.assert_allclose(
        [domain["1"] for domain in row["k_step"]], row["one_step"], rtol=0.5
    )
    singles = [row["one_step"] for row in result["experts"].values()]
    ratio = np.mean(row["one_step"]) / np.mean(singles)
    assert result["ratio_to_mean_single"]["uniform"] == pytest.approx(ratio)


def test_evaluations_are_reproducible_and_say_what_they_scored(pipeline, capsys):
    result = artifacts.read_json(pipeline / "random.json")
    assert (result["stochastic"], result["env"]) == (True, "hopper")
    assert len(result["episodes"][0]) == result["num_episodes"] == 4
    assert result["mean"] == pytest.approx(np.mean(result["episodes"]))
    assert result["interval"][0] < result["mean"] < result["interval"][1]
    assert result["provenance"]["versions"]["jax"] == jax.__version__
    own = artifacts.read_json(pipeline / "policy" / "evaluation.json")
    assert (own["step"], own["stochastic"]) == (20, True)
    flags = ("--policy=random", "--env=hopper", "--episodes=4")
    command(evaluate, *flags, f"--out={pipeline}/again.json")
    assert (
        artifacts.read_json(pipeline / "again.json")["episodes"] == result["episodes"]
    )
    stamp = (pipeline / "random.json").stat().st_mtime_ns
    command(evaluate, *flags, f"--out={pipeline}/random.json")
    assert (pipeline / "random.json").stat().st_mtime_ns == stamp
    command(evaluate, *flags, f"--out={pipeline}/again.json", "--seed=1")
    assert (
        artifacts.read_json(pipeline / "again.json")["episodes"] != result["episodes"]
    )
    assert "random: hopper, 1 × 4 sampled episodes" in capsys.readouterr().out


def test_the_report_has_every_table_and_picture(pipeline):
    folder = pipeline / "report"
    text = (folder / "report.md").read_text()
    content = artifacts.read_json(folder / "report.json")
    sections = content["sections"]
    assert list(sections) == [
        "Returns",
        "Model error: fused",
        "Further ahead, and uncertainty: fused",
        "Training of the models",
        "Seconds per stage",
    ]
    for title in sections:
        assert f"## {title}" in text
    drawn = {path.stem for path in (folder / "figures").iterdir()}
    assert drawn == {
        *("returns", "errors", "k_step", "uncertainty", "landscape", "validation")
    }
    assert all(f"(figures/{name}.png)" in text for name in drawn)
    returns = {row["policy"]: row for row in sections["Returns"]}
    behaviour = artifacts.read_json(pipeline / "random.json")
    assert returns["random"]["return"]["mean"] == behaviour["mean"]
    # Three sampled episodes per seed of evaluate go before the two of the training.
    assert (returns["policy"]["seeds"], returns["policy"]["episodes"]) == (2, 6)
    fusion = artifacts.read_json(pipeline / "fused" / "fusion.json")
    errors = {row["model"]: row for row in sections["Model error: fused"]}
    assert list(errors) == [
        *("expert slow", "expert fast", "fused, uncertainty", "fused, uniform")
    ]
    assert errors["fused, uniform"]["fast"] == fusion["fused"]["uniform"]["one_step"][1]
    singles = [errors[f"expert {name}"]["ratio"] for name in ("slow", "fast")]
    assert np.mean(singles) == pytest.approx(1.0)
    stages = {(row["run"], row["stage"]) for row in sections["Seconds per stage"]}
    assert stages == {
        *(("slow", "train"), ("fast", "train"), ("fused", "measure")),
        ("policy", "train"),
    }


def test_finished_runs_are_left_as_they_are(pipeline, tmp_path):
    for name in ("slow", "policy"):
        before = tiny.snapshot(pipeline / name / "checkpoints")
        rows = tiny.rows_of(pipeline / name)
        module, flags = (
            (train_dynamics, train_flags(pipeline, name))
            if name == "slow"
            else (train_policy, policy_flags(pipeline, name))
        )
        command(module, *flags)
        assert tiny.snapshot(pipeline / name / "checkpoints") == before
        assert tiny.rows_of(pipeline / name) == rows


KILLER = """
import os, signal, sys
from experiments import {module} as command, _run
saves = 0
save = _run.Run.save
def killing(self, step, *args, **kwargs):
    global saves
    saves += 1
    if saves == {before}:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, *args, **kwargs)
    if saves == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
_run.Run.save = killing
sys.exit(command.main(["command", *sys.argv[1:]]))
"""


def killed(module, *flags, before=0, after=0):
    """Runs a command that is killed before or after its n-th checkpoint, with this
    process's devices and threads, without which floats may differ."""
    name = module.__name__.split(".")[-1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8",
    }
    code = KILLER.format(module=name, before=before, after=after)
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("when", "left"), [("before", []), ("after", [10])])
def test_training_a_model_survives_kill_9(pipeline, when, left):
    name = f"killed-{when}"
    data = f"--data={pipeline}/slow.hdf5"
    flags = (data, f"--run_dir={pipeline}/{name}", *tiny.MODEL)
    killed(train_dynamics, *flags, **{when: 1})
    path = pipeline / name
    # Rows of metrics are there that no checkpoint covers: they are written again.
    assert len(tiny.rows_of(path)) == 2
    assert artifacts.steps(path / "checkpoints") == left
    assert not (path / "result.json").exists()
    command(train_dynamics, *flags)
    assert tiny.rows_of(path) == tiny.rows_of(pipeline / "slow")
    ours, whole = (tiny.digests(p / "checkpoints") for p in (path, pipeline / "slow"))
    assert ours == whole
    results = [
        artifacts.read_json(p / "result.json")["test_rms"]
        for p in (path, pipeline / "slow")
    ]
    assert results[0] == results[1]
    assert tiny.digests(pipeline / "fast" / "checkpoints") != whole


@pytest.mark.slow
def test_training_a_policy_survives_kill_9(pipeline):
    flags = policy_flags(pipeline, "killed-policy")
    killed(train_policy, *flags, before=2)
    path, whole = pipeline / "killed-policy", pipeline / "policy"
    # The last evaluation has been made, but the step it belongs to is not kept.
    assert artifacts.steps(path / "checkpoints") == [2]
    assert artifacts.steps(path / "policy") == [10, 20]
    command(train_policy, *flags)
    assert tiny.rows_of(path) == tiny.rows_of(whole)
    for folder in ("checkpoints", "policy"):
        assert tiny.digests(path / folder) == tiny.digests(whole / folder)
    results = [
        artifacts.read_json(p / "result.json")["episodes"] for p in (path, whole)
    ]
    assert results[0] == results[1]


@pytest.mark.slow
def test_fusing_survives_kill_9(pipeline):
    flags = (f"--experts={pipeline}/slow,{pipeline}/fast", f"--run_dir={pipeline}/kf")
    killed(fuse_dynamics, *flags, after=1)
    path, whole = pipeline / "kf", pipeline / "fused"
    assert not (path / "fusion.json").exists()
    command(fuse_dynamics, *flags)
    results = [(p / "fusion.json").read_bytes() for p in (path, whole)]
    assert results[0] == results[1]
    assert tiny.digests(path / "checkpoints") == tiny.digests(whole / "checkpoints")


def test_collecting_survives_kill_9(pipeline, tmp_path):
    """It is short, so it begins anew: to the same rows, with nothing half written."""
    code = (
        "import os, signal, sys\nimport h5py\n"
        "from experiments import collect_data\n"
        "make = h5py.Group.create_dataset\n"
        "def killing(self, name, *args, **kwargs):\n"
        "    make(self, name, *args, **kwargs)\n"
        "    if name == 'actions': os.kill(os.getpid(), signal.SIGKILL)\n"
        "h5py.Group.create_dataset = killing\n"
        "collect_data.main(sys.argv)\n"
    )
    flags = (*COLLECT, f"--out={tmp_path}/slow.hdf5", "--seed=0")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *flags], env=environment)
    assert done.returncode == -9
    assert not (tmp_path / "slow.hdf5").exists()
    command(collect_data, *flags)
    ours, whole = (read_arrays(p / "slow.hdf5") for p in (tmp_path, pipeline))
    for key in whole:
        np.testing.assert_array_equal(ours[key], whole[key])
    assert not np.array_equal(
        read_arrays(pipeline / "fast.hdf5")["actions"], whole["actions"]
    )


def test_an_unlisted_environment_trains_and_is_not_evaluated(
    pipeline, tmp_path, monkeypatch, capsys
):
    (tmp_path / "my_task.py").write_text(
        "import jax.numpy as jnp\n"
        "def fallen(observation, action, next_observation):\n"
        "    return next_observation[..., 0] < 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = [f for f in tiny.POLICY if not f.startswith("--eval_every")]
    command(
        train_policy,
        *(f"--model={pipeline}/fused", "--env=my_robot", *flags, "--eval_every=20"),
        *("--terminated=my_task:fallen", f"--run_dir={tmp_path}/policy"),
    )
    assert "evaluation skipped: 'my_robot'" in capsys.readouterr().out
    result = artifacts.read_json(tmp_path / "policy" / "result.json")
    assert "mean" not in result  # and one seed alone: no seed axis
    assert artifacts.load_run(tmp_path / "policy").policy is not None
    runs = f"--runs={tmp_path}/policy"
    command(report, runs, f"--out={tmp_path}/report")
    (row,) = artifacts.read_json(tmp_path / "report" / "report.json")["sections"][
        "Returns"
    ]
    assert "return" not in row


def test_seeds_of_one_method_are_one_row(pipeline, tmp_path):
    """Copies with another seed in their config: the report pools their episodes."""
    for seed in (0, 1):
        path = tmp_path / f"fused-seed{seed}"
        shutil.copytree(pipeline / "policy", path)
        config = json.loads((path / "config.json").read_text())
        config["config"] |= {"seed": seed, "run_dir": str(path)}
        (path / "config.json").write_text(json.dumps(config))
    shutil.copytree(pipeline / "policy", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["config"]["penalty"] = 9.0
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    names = ("fused-seed0", "other", "fused-seed1")
    runs = ",".join(str(tmp_path / name) for name in names)
    command(report, f"--runs={runs}", f"--out={tmp_path}/report")
    rows = artifacts.read_json(tmp_path / "report" / "report.json")["sections"][
        "Returns"
    ]
    assert [(row["policy"], row["seeds"], row["episodes"]) for row in rows] == [
        ("fused", 4, 12),
        ("other", 2, 6),
    ]
