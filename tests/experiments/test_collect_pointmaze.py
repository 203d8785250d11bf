"""Recordings of the maze: read back by both readers, made once, and scored."""

import numpy as np
import pytest

from emfuse_jax import artifacts
from emfuse_jax.data import load_dataset
from experiments import collect_data, collect_pointmaze, evaluate

pytest.importorskip("gymnasium_robotics")
FLAGS = ("--steps=620", "--num_envs=2")


def command(module, *flags):
    assert module.main([module.__name__, *map(str, flags)]) == 0


def test_a_recording_is_read_back_and_made_once(tmp_path, capsys):
    out = tmp_path / "umaze.hdf5"
    command(collect_pointmaze, f"--out={out}", *FLAGS)
    stamp = out.stat().st_mtime_ns
    command(collect_pointmaze, f"--out={out}", *FLAGS)
    assert out.stat().st_mtime_ns == stamp
    assert "620 steps, 4 episodes (2 cut" in capsys.readouterr().out
    command(
        collect_pointmaze,
        "--format=minari",
        "--out=mine/maze/umaze-v0",
        f"--root={tmp_path}",
        *FLAGS,
    )
    first = load_dataset(out)
    second = load_dataset("mine/maze/umaze-v0", root=tmp_path)
    assert first.observation.shape == (620, 4)
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert set(np.unique(first.reward)) <= {0.0, 1.0}
    assert not first.terminated.any()
    status = collect_pointmaze.main(["x", f"--out={out}", *FLAGS, "--seed=1"])
    assert status == 2
    assert "choose another --out" in capsys.readouterr().err


def test_going_to_the_goal_beats_wandering_and_evaluation_scores_in_the_maze(tmp_path):
    wander, goal = (
        collect_pointmaze.run(
            collect_pointmaze.CollectPointMazeConfig(
                out=str(tmp_path / f"{policy}.hdf5"),
                policy=policy,
                steps=1200,
                num_envs=4,
            ),
            progress=False,
        )
        for policy in ("waypoint", "goal")
    )
    assert goal["score_mean"] > 60 > 40 > wander["score_mean"]
    out = tmp_path / "random.json"
    flags = ("--policy=random", "--env=pointmaze-umaze", "--episodes=2")
    command(evaluate, *flags, f"--out={out}")
    result = artifacts.read_json(out)
    assert result["mean"] < 60
    assert result["version"] == "v3"  # the maze's own, whatever --version says


@pytest.mark.parametrize("flag", ["--steps=0", "--num_envs=0"])
def test_nothing_to_record_is_refused(tmp_path, capsys, flag):
    out = f"--out={tmp_path / 'x.hdf5'}"
    for module in (collect_pointmaze, collect_data):
        assert module.main(["x", out, flag]) == 2
        assert f"{flag[2:]} must be at least 1" in capsys.readouterr().err
