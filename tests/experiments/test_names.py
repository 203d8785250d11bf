"""Wrong names are refused with the nearest right one."""

import pytest

import _tiny_runs as tiny
from emfuse_jax import artifacts
from experiments import (
    _names,
    _policy_run,
    collect_data,
    demo,
    evaluate,
    fuse_dynamics,
    fuse_llm,
    merge,
    report,
    train_behaviour,
    train_dynamics,
    train_policy,
)

FLAGS = ["seed", "etm.learning_rate", "adetm.learning_rate", "adetm.num_lags"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sede", "Did you mean --seed?"),
        ("learning_rate", "Did you mean --adetm.learning_rate, --etm.learning_rate?"),
        ("adetm.learnig_rate", "Did you mean --adetm.learning_rate?"),
        ("adetm.num_lag", "Did you mean --adetm.num_lags?"),
        ("aepo.critics.discount", "It belongs to train_policy --method=aepo."),
        ("zzz", "unknown flag --zzz. --help"),
    ],
)
def test_flags(name, hint):
    assert hint in _names.unknown_flag(name, FLAGS)


@pytest.fixture
def place(tmp_path):
    """A data set and two run directories."""
    tiny.write_data(tmp_path / "hopper.hdf5")
    for name in ("fused", "slow"):
        (tmp_path / name).mkdir()
        artifacts.write_json(tmp_path / name / "config.json", {"kind": "x"})
        artifacts.write_json(tmp_path / name / "model.json", {})
    return tmp_path


@pytest.mark.parametrize(
    ("module", "flags", "near"),
    [
        (collect_data, "--env=hoper --out=@/x.hdf5", "'hopper'"),
        (collect_data, "--policy=hoper_medium --out=@/x.hdf5", "'hopper_medium'"),
        (train_behaviour, "--env=walker --run_dir=@/run", "'walker2d'"),
        (demo, "--env=hooper --run_dir=@/run", "'hopper'"),
        (demo, "--policies=random.npz,hoper_medium --run_dir=@/run", "'random'"),
        (demo, "--parts=dynamic --run_dir=@/run", "'dynamics'"),
        (evaluate, "--policy=hopper_medum --env=hopper --out=@/x", "'hopper_medium'"),
        (evaluate, "--policy=random --env=pointmaze --out=@/x", "'pointmaze-umaze'"),
        (train_dynamics, "--data=@/hoper.hdf5 --run_dir=@/run", "hopper.hdf5'"),
        (train_dynamics, "--model=adtm --run_dir=@/run", "'adetm'"),
        (train_dynamics, "--preset=fats --run_dir=@/run", "'fast'"),
        (train_dynamics, "--lerning_rate=1 --run_dir=@/run", "--adetm.learning_rate"),
        (train_policy, "--env=hoper --model=@/fused --run_dir=@/run", "'hopper'"),
        (train_policy, "--env=hopper --model=@/fusd --run_dir=@/run", "/fused"),
        (train_policy, "--method=difusion --run_dir=@/run", "'diffusion'"),
        (train_policy, "--method=iql --data=@/hoppr.hdf5 --run_dir=@/run", "per.hdf5'"),
        (fuse_dynamics, "--experts=@/slo,@/fused --run_dir=@/run", "/slow"),
        (fuse_llm, "--experts=@/slo,@/fused --prompt=x --run_dir=@/run", "/slow'"),
        (fuse_llm, "--experts=@/slow --score=@/slo --run_dir=@/run", "/slow'"),
        (merge, "--experts=@/slo,@/fused --run_dir=@/run", "/slow'"),
        (merge, "--experts=@/slo,@/fusde --run_dir=@/run", "/slow'"),
        (report, "--runs=@/fusedd --out=@/out", "/fused'"),
    ],
)
def test_commands(place, capsys, module, flags, near):
    before = tiny.snapshot(place)
    argv = [module.__name__, *flags.replace("@", str(place)).split()]
    assert module.main(argv) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"id you mean {near}" in error or (
        "id you mean " in error and near in error.rpartition("id you mean ")[2]
    )
    assert tiny.snapshot(place) == before


def test_an_environment_that_is_only_trained_for_is_asked_about():
    assert "did you mean 'hopper'?" in _policy_run.skipped("hoper")
    assert "mean" not in _policy_run.skipped("ant")
    assert "mean" not in _policy_run.skipped("")


def test_the_right_name_is_not_suggested_when_something_else_is_wrong():
    with pytest.raises(ValueError, match=r"^broken$"), _names.environment("hopper"):
        raise ValueError("broken")
