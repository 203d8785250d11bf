"""Bad input on the command lines: status 2, the value, what was expected and the fix; and
what was there before stays as it was."""

import importlib
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

import _tiny_runs as tiny
from emfuse_jax import artifacts
from emfuse_jax.data.d4rl_reader import read_arrays, read_d4rl
from emfuse_jax.dynamics import fit_scales
from experiments import (
    evaluate,
    fuse_dynamics,
    report,
    train_dynamics,
    train_policy,
)
from experiments._flags import _attribute_docs, _leaves, parse
from experiments._run import open_run

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = [
    *("collect_data", "train_dynamics", "fuse_dynamics", "train_policy", "evaluate"),
    *("train_lm_experts", "fuse_llm", "merge", "report", "demo", "train_behaviour"),
]


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
    monkeypatch.setenv("EMFUSE_JAX_CACHE", "0")


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command that must refuse, leaving ``tmp_path`` as it is; returns its words."""

    def run(module, *flags):
        before = tiny.snapshot(tmp_path)
        entries = sorted(tmp_path.rglob("*"))
        status = module.main([module.__name__, *map(str, flags)])
        error = " ".join(capsys.readouterr().err.split())
        assert status == 2, error
        assert error.startswith("error: "), error
        assert "Traceback" not in error
        assert tiny.snapshot(tmp_path) == before
        assert sorted(tmp_path.rglob("*")) == entries
        return error

    return run


def untrained(path, data, *flags):
    """A run directory of train_dynamics whose model has not learned anything."""
    argv = ["x", f"--data={data}", f"--run_dir={path}", *tiny.MODEL, *flags]
    config = parse(
        train_dynamics.TrainDynamicsConfig, argv, presets=train_dynamics.PRESETS
    ).config
    dataset = read_d4rl(data)
    spec = train_dynamics.SpaceSpec(
        dataset.observation.shape[1], dataset.action.shape[1]
    )
    description = artifacts.describe(config.model, config.chosen, spec)
    learner = artifacts.build(description)
    lags = getattr(config.chosen, "num_lags", 1)
    scales = fit_scales(dataset, lags)
    with open_run(path, config, kind="train_dynamics") as run:
        artifacts.write_description(path, description)
        state = jax.jit(learner.init)(jax.random.key(0), scales)
        run.save(1, state, score=0.0)
    return path


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two data sets and an untrained expert on each; do not write here."""
    root = tmp_path_factory.mktemp("experts")
    untrained(root / "a", tiny.write_data(root / "a.hdf5"))
    tiny.write_data(root / "b.hdf5", seed=1)
    shutil.copytree(root / "a", root / "b")
    config = artifacts.read_json(root / "b" / "config.json")
    config["config"] |= {"data": [str(root / "b.hdf5")], "run_dir": str(root / "b")}
    artifacts.write_json(root / "b" / "config.json", config)
    return root


def test_help_of_every_command(capsys):
    for name in COMMANDS:
        module = importlib.import_module(f"experiments.{name}")
        assert module.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert module.__doc__.strip().splitlines()[0] in text
        assert "--traceback" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_says_what_it_is(name):
    module = importlib.import_module(f"experiments.{name}")
    configs = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and value.__name__.endswith("Config")
    ]
    for config_cls in configs:
        leaves = list(_leaves(config_cls, None, ""))
        assert [leaf.name for leaf in leaves if not leaf.help] == []


def test_help_of_inherited_fields_is_that_of_the_base():
    from emfuse_jax.dynamics import AdetmConfig, EtmConfig

    docs = _attribute_docs(AdetmConfig)
    assert "Adam" in docs["learning_rate"]
    assert "slices" in docs["num_lags"]
    assert _attribute_docs(EtmConfig)["energy_sizes"]


def test_the_commands_on_the_first_pages_parse():
    pages = [ROOT / "README.md", ROOT / "WORKSPACE.md", ROOT / "Makefile"]
    pages += [ROOT / "experiments" / f"{name}.py" for name in COMMANDS]
    found = 0
    for page in pages:
        text = page.read_text().replace("\\\n", " ").split('"""\n\nimport')[0]
        for name, line in re.findall(r"-m experiments\.(\w+)((?: +--[^\s`]+)*)", text):
            module = importlib.import_module(f"experiments.{name}")
            flags = [*line.split(), "--help"]
            assert module.main([name, *flags]) == 0, (page, line)
            found += 1
    assert found >= 12


@pytest.mark.parametrize("command", [train_dynamics, train_policy, fuse_dynamics])
def test_what_must_be_named(refused, command, tmp_path):
    assert "is required; see --help" in refused(command)
    assert "Did you mean" in refused(command, "--run_dri=x")


def test_data_that_are_no_data(refused, tmp_path):
    run_dir = f"--run_dir={tmp_path}/run"
    tiny.write_data(tmp_path / "good.hdf5")
    (tmp_path / "cut.hdf5").write_bytes((tmp_path / "good.hdf5").read_bytes()[:3000])
    error = refused(train_dynamics, f"--data={tmp_path}/god.hdf5", run_dir)
    assert "no file" in error
    assert "good.hdf5" in error
    assert "collect_data" in error
    error = refused(train_dynamics, f"--data={tmp_path}/cut.hdf5", run_dir)
    assert "not a whole HDF5 file" in error
    assert "copy or download it again" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": None}, ["rewards absent", "Add the missing"]),
        ({"rewards": np.zeros(7)}, ["rewards has 7 rows", "observations have 200"]),
        ({"observations": np.nan}, ["1 values", "NaN or infinite", "[3, 2]", "drop"]),
        ({"actions": np.inf}, ["1 values", "NaN or infinite", "[3, 2]"]),
        ({"actions": 1.01}, ["1 action values", "[3, 2]", "1.01", "rescale"]),
    ],
)
def test_arrays_that_cannot_be_learned_from(refused, tmp_path, change, words):
    import h5py

    path = tmp_path / "data.hdf5"
    arrays = tiny.arrays()
    ((key, value),) = change.items()
    if value is None:
        del arrays[key]
    elif np.ndim(value):
        arrays[key] = value
    else:
        arrays[key][3, 2] = value
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    error = refused(train_dynamics, f"--data={path}", f"--run_dir={tmp_path}/run")
    for word in (str(path), *words):
        assert word in error
    # A rounding error is none.
    if key == "actions" and value < np.inf:
        arrays[key][3, 2] = 1.0 + 5e-7
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
        assert read_d4rl(path).action.max() <= 1.0


def test_episodes_shorter_than_the_window(refused, tmp_path):
    data = tiny.write_data(tmp_path / "short.hdf5", length=4)
    flags = (f"--data={data}", f"--run_dir={tmp_path}/run")
    error = refused(train_dynamics, *flags, "--adetm.num_lags=5")
    assert "the longest episode has 4 steps" in error
    assert "num_lags of at most 4" in error
    # Long enough to train on, but not to be held out with a whole history behind it.
    error = refused(train_dynamics, *flags, "--adetm.num_lags=4")
    assert "no held-out episode has 5 steps" in error


def test_counts_that_do_not_divide(refused, tmp_path):
    data = tiny.write_data(tmp_path / "data.hdf5")
    flags = (f"--data={data}", f"--run_dir={tmp_path}/run", "--adetm.num_steps=2500")
    error = refused(train_dynamics, *flags)
    assert "adetm.num_steps=2500 must be a multiple of chunk=1000" in error
    error = refused(train_policy, "--model=x", "--run_dir=y", "--num_updates=1500")
    assert "num_updates=1500 must be a multiple" in error


def test_experts_that_cannot_be_fused(refused, experts, tmp_path):
    tiny.write_data(tmp_path / "wide.hdf5", observation=17, action=6)
    untrained(tmp_path / "wide", tmp_path / "wide.hdf5")
    run_dir = f"--run_dir={tmp_path}/fused"
    pair = f"--experts={experts}/a,{tmp_path}/wide"
    error = refused(fuse_dynamics, pair, run_dir)
    assert "expert 1 has observation size 17 and action size 6" in error
    assert "expert 0 has observation size 11 and action size 3" in error
    error = refused(fuse_dynamics, f"--experts={experts}/a,{tmp_path}/none", run_dir)
    assert "has no model.json" in error
    data = f"--data={tmp_path}/wide.hdf5"
    both = f"--experts={experts}/a,{experts}/b"
    error = refused(fuse_dynamics, both, run_dir, data)
    assert "trained on" in error
    error = refused(fuse_dynamics, f"--experts={experts}/a,{experts}/a", run_dir)
    assert "names a run twice" in error


@pytest.mark.parametrize(
    ("rule", "weights", "words"),
    [
        ("fixed", "0.5,0.6", ["sum to 1.1", "[0.454545, 0.545455]"]),
        ("fixed", "1.5,-0.5", ["[ 1.5, -0.5]", "negative"]),
        ("fixed", "1.0", ["(1,)", "each of the 2 experts"]),
        ("uncertainty", "0.5,0.5", ["not used", "--fusion.rule=fixed"]),
    ],
)
def test_weights_that_are_no_weights(refused, experts, tmp_path, rule, weights, words):
    both = f"--experts={experts}/a,{experts}/b"
    flags = (f"--fusion.rule={rule}", f"--fusion.weights={weights}")
    error = refused(fuse_dynamics, both, *flags, f"--run_dir={tmp_path}/fused")
    for word in words:
        assert word in error


def test_a_checkpoint_of_another_architecture(refused, experts, tmp_path):
    shutil.copytree(experts / "a", tmp_path / "a")
    description = artifacts.read_json(tmp_path / "a" / "model.json")
    description["config"]["energy_sizes"] = [16]
    artifacts.write_description(tmp_path / "a", description)
    both = f"--experts={tmp_path}/a,{experts}/b"
    error = refused(fuse_dynamics, both, f"--run_dir={tmp_path}/fused")
    assert "is of another architecture" in error
    assert "float32[8] in the checkpoint, float32[16] in the model" in error
    assert "build the model with the config that it was trained with" in error


def test_names_that_are_not_known(refused, experts, tmp_path):
    flags = (f"--model={experts}/a", f"--run_dir={tmp_path}/policy")
    error = refused(train_policy, *flags, "--env=ant")
    assert "'ant'; known: hopper, walker2d, halfcheetah" in error
    assert "module:function" in error
    assert "give at least one" in refused(train_policy, *flags)
    error = refused(train_policy, *flags, "--terminated=nowhere:fallen")
    assert "'nowhere' cannot be imported" in error
    error = refused(train_policy, *flags, "--env=hopper", "--preset=fats")
    assert "did you mean 'fast'? Known: demo, fast, paper" in error
    error = refused(train_policy, *flags, "--env=walker2d")
    assert "observation_size=17" in error
    error = refused(
        train_dynamics, "--data=mujoco/hopper/none-v0", f"--run_dir={tmp_path}/run"
    )
    assert "mujoco/hopper/none-v0" in error


def test_run_directories_that_are_not_ours(refused, experts, tmp_path):
    data = f"--data={tiny.write_data(tmp_path / 'data.hdf5')}"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("do not lose me")
    error = refused(train_dynamics, data, f"--run_dir={tmp_path}/thesis", *tiny.MODEL)
    assert "not empty and no run directory" in error
    assert "--run_dir" in error
    error = refused(
        train_dynamics, data, f"--run_dir={tmp_path}/data.hdf5/x", *tiny.MODEL
    )
    assert "cannot be written" in error
    # A run of another config, or of another command, is not taken over either.
    run = untrained(tmp_path / "run", tmp_path / "data.hdf5")
    error = refused(train_dynamics, data, f"--run_dir={run}", *tiny.MODEL, "--seed=5")
    assert "seed: 0 ≠ 5" in error
    error = refused(
        fuse_dynamics, f"--experts={experts}/a,{experts}/b", f"--run_dir={run}"
    )
    assert "a run of 'train_dynamics', not of 'fuse_dynamics'" in error


def test_what_cannot_be_evaluated(refused, experts, tmp_path):
    out = f"--out={tmp_path}/result.json"
    assert "give one of --run_dir and --policy" in refused(evaluate, out)
    error = refused(evaluate, f"--run_dir={experts}/a", "--env=hopper", out)
    assert "a dynamics model" in error
    assert "train_policy" in error
    error = refused(evaluate, "--policy=nobody", "--env=hopper", out)
    assert "no behaviour policy 'nobody'" in error
    error = refused(evaluate, "--policy=hopper_medium", "--env=walker2d", out)
    assert "observation_size=11" in error
    assert "--env is required" in refused(evaluate, "--policy=random", out)
    error = refused(evaluate, "--policy=random", "--env=ant", out)
    assert "unknown environment 'ant'" in error
    (tmp_path / "result.json").write_text('{"precious": 1}')
    error = refused(evaluate, "--policy=random", "--env=hopper", out)
    assert "no result of evaluate" in error


def test_what_cannot_be_reported(refused, experts, tmp_path):
    out = f"--out={tmp_path}/report"
    assert "is no run directory" in refused(report, f"--runs={tmp_path}", out)
    assert "is not finished" in refused(report, f"--runs={experts}/a", out)
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "done").mkdir()
    artifacts.write_json(
        tmp_path / "done" / "config.json", {"kind": "train_dynamics", "config": {}}
    )
    artifacts.write_json(tmp_path / "done" / "result.json", {"test_rms": {}})
    done = f"--runs={tmp_path}/done"
    error = refused(report, done, f"--behaviour={tmp_path}/x.json", out)
    assert "is no result of evaluate" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("mine")
    error = refused(report, done, f"--out={tmp_path}/mine")
    assert "choose another --out" in error


def test_a_finished_data_set_is_not_overwritten(tmp_path, capsys):
    from experiments import collect_data

    path = tiny.write_data(tmp_path / "mine.hdf5")
    before = read_arrays(path)
    status = collect_data.main(["collect_data", f"--out={path}", "--steps=50"])
    assert status == 2
    assert "give --overwrite" in " ".join(capsys.readouterr().err.split())
    for key, value in read_arrays(path).items():
        np.testing.assert_array_equal(value, before[key])
