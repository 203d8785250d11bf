import dataclasses
import json
import math
import warnings

import numpy as np
import pytest

from emfuse_jax.data.behaviour import Behaviour, Linear, save_behaviour
from emfuse_jax.data.d4rl_reader import read_arrays, read_attributes, read_d4rl
from emfuse_jax.data.dataset import episode_bounds
from emfuse_jax.data.load import load_dataset

pytest.importorskip("experiments")
from experiments.collect_data import CollectConfig, episode_speeds, main, run


def config(tmp_path, **changes):
    defaults = {"steps": 400, "num_envs": 2, "out": str(tmp_path / "out.hdf5")}
    return CollectConfig(**{**defaults, **changes})


def save_policy(path, observation=11, action=3, hidden=8):
    rng = np.random.default_rng(0)
    sizes = [
        (hidden, observation),
        (hidden, hidden),
        (action, hidden),
        (action, hidden),
    ]
    save_behaviour(
        path,
        Behaviour(
            *(
                Linear(
                    0.1 * rng.standard_normal(size).astype(np.float32),
                    np.full(size[0], -1.0, np.float32),
                )
                for size in sizes
            )
        ),
    )


def test_writes_what_it_says_and_leaves_a_finished_file_alone(tmp_path):
    settings = config(tmp_path)
    summary = run(settings, progress=False)
    data = read_d4rl(settings.out)
    starts, _ = episode_bounds(data)
    assert summary["rows"] == len(data.reward) == 400
    assert summary["episodes"] == len(starts)
    assert summary["cut_episodes"] <= 2
    attributes = read_attributes(settings.out)
    assert attributes["environment"] == "hopper-v4"
    assert json.loads(attributes["how"])["policy"] == "random"
    stamp = (tmp_path / "out.hdf5").stat().st_mtime_ns
    assert run(settings, progress=False) == summary
    assert (tmp_path / "out.hdf5").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="overwrite"):
        run(dataclasses.replace(settings, seed=1), progress=False)
    again = dataclasses.replace(settings, overwrite=True)
    assert run(again, progress=False) == summary


def test_a_policy_file_a_seed_and_the_physics_decide_the_rows(tmp_path):
    save_policy(tmp_path / "p.npz")
    changes = {
        "a": {},
        "b": {},
        "seed": {"seed": 1},
        "gravity": {"gravity": 1.5},
        "noise": {"noise": 0.0},
        "random": {"policy": "random"},
    }
    rows = {}
    for name, change in changes.items():
        out = str(tmp_path / f"{name}.hdf5")
        policy = {"policy": str(tmp_path / "p.npz"), **change}
        run(config(tmp_path, out=out, steps=60, **policy), progress=False)
        rows[name] = read_arrays(out)["qpos"]
    np.testing.assert_array_equal(rows["a"], rows["b"])
    for name in ("seed", "gravity", "noise", "random"):
        assert not np.array_equal(rows["a"], rows[name])


def test_speed_limits_keep_whole_episodes(tmp_path):
    run(config(tmp_path), progress=False)
    arrays = read_arrays(tmp_path / "out.hdf5")
    speeds = episode_speeds(arrays, 0.008)
    middle = float(np.median(speeds))
    counts = []
    for name, limits in (
        ("slow", {"max_speed": middle}),
        ("fast", {"min_speed": middle}),
    ):
        out = str(tmp_path / f"{name}.hdf5")
        summary = run(config(tmp_path, out=out, **limits), progress=False)
        kept = episode_speeds(read_arrays(out), 0.008)
        low, high = (
            limits.get("min_speed", -math.inf),
            limits.get("max_speed", math.inf),
        )
        assert ((kept >= low) & (kept < high)).all()
        counts.append(summary["episodes"])
    assert sum(counts) == len(speeds)
    assert min(counts) > 0
    with pytest.raises(ValueError, match=r"none of \d+ episodes .* median"):
        run(config(tmp_path, out=str(tmp_path / "x"), min_speed=99.0), progress=False)


def test_minari_output_holds_the_same_rows(tmp_path):
    run(config(tmp_path), progress=False)
    minari = config(
        tmp_path, out="mine/hopper/random-v0", format="minari", root=str(tmp_path)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(minari, progress=False)
    expected = read_d4rl(tmp_path / "out.hdf5")
    for left, right in zip(
        load_dataset(minari.out, root=tmp_path), expected, strict=True
    ):
        np.testing.assert_array_equal(left, right)
    with pytest.raises(FileExistsError, match="overwrite"):
        run(minari, progress=False)


def test_bad_input_is_refused_before_rolling(tmp_path):
    with pytest.raises(ValueError, match="'ant'; known: hopper"):
        run(config(tmp_path, env="ant"))
    with pytest.raises(ValueError, match="out is empty"):
        config(tmp_path, out="")
    with pytest.raises(FileNotFoundError, match="no behaviour policy 'best'"):
        run(config(tmp_path, policy="best"))
    save_policy(tmp_path / "p.npz", observation=17, action=6)
    with pytest.raises(ValueError, match=r"p.npz.*observation_size=17"):
        run(config(tmp_path, policy=str(tmp_path / "p.npz")))
    with pytest.raises(ValueError, match="format='csv'"):
        config(tmp_path, format="csv")
    with pytest.raises(ValueError, match="min_speed=2"):
        config(tmp_path, min_speed=2.0, max_speed=1.0)
    with pytest.raises(ValueError, match="noise=-1"):
        config(tmp_path, noise=-1.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write into"):
        run(config(tmp_path, out=str(tmp_path / "file" / "out.hdf5")))
    (tmp_path / "other.hdf5").write_text("precious")
    with pytest.raises(FileExistsError):
        run(config(tmp_path, out=str(tmp_path / "other.hdf5")))
    assert (tmp_path / "other.hdf5").read_text() == "precious"
    assert not (tmp_path / "out.hdf5").exists()


def test_the_command_line_says_what_it_made_and_what_is_wrong(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("EMFUSE_JAX_CACHE", "0")
    argv = ["collect_data", "--steps=100", "--num_envs=2"]
    assert main([*argv, f"--out={tmp_path / 'a.hdf5'}"]) == 0
    assert "100 steps" in capsys.readouterr().out
    assert main([*argv, f"--out={tmp_path / 'b.hdf5'}", "--env=ant"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "unknown environment 'ant'" in error
    assert "Traceback" not in error
    assert main(argv) == 2
    assert "--out is required" in " ".join(capsys.readouterr().err.split())
    assert main(["collect_data", "--help"]) == 0
    assert "--min_speed" in capsys.readouterr().out
