"""Training a behaviour policy: bookkeeping, resuming after a kill, packaging."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import artifacts
from emfuse_jax.base import SpaceSpec
from emfuse_jax.data.behaviour import behaviour_act, load_behaviour
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.policies.sac import SacConfig, sac
from experiments import train_behaviour
from experiments.train_behaviour import (
    RunState,
    TrainBehaviourConfig,
    chosen,
    collect,
    main,
    to_behaviour,
)

SMALL = (
    "--env=hopper",
    "--total_steps=96",
    "--num_envs=4",
    "--warmup_steps=16",
    "--batch_size=8",
    "--evaluate_every=32",
    "--evaluate_episodes=2",
    "--sac.hidden_sizes=8,8",
)


class Killed(Exception):
    """Stands for a kill between two writes."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run without interruption, and one killed three times."""
    root = tmp_path_factory.mktemp("runs")
    whole, broken = root / "whole", root / "broken"
    assert main(["train", *SMALL, f"--run_dir={whole}"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        # After the first step's checkpoint, in the middle of the second's evaluation,
        # and between the second's metrics and its checkpoint.
        for place, count in (("scores", 2), ("scores", 1), ("save", 1)):
            _kill_at(patch, place, count)
            with pytest.raises(Killed):
                main(["train", *SMALL, f"--run_dir={broken}"])
            patch.undo()
    assert main(["train", *SMALL, f"--run_dir={broken}"]) == 0
    return whole, broken


def _kill_at(patch, place, count):
    owner = train_behaviour if place == "scores" else train_behaviour.Run
    original, calls = getattr(owner, place), []

    def killed(*args, **options):
        calls.append(None)
        if len(calls) == count:
            raise Killed
        return original(*args, **options)

    patch.setattr(owner, place, killed)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_numbers(runs):
    whole, broken = runs
    rows = [artifacts.read_metrics(run / "metrics.jsonl") for run in runs]
    for one, other in zip(*rows, strict=True):
        for name in one.keys() - {"time", "cpu_seconds"}:
            np.testing.assert_equal(one[name], other[name], err_msg=name)
    assert [row["step"] for row in rows[0]] == [32, 64, 96]
    digests = [
        artifacts.read_meta(run / "checkpoints", 96)["digest"]
        for run in (whole, broken)
    ]
    assert digests[0] == digests[1]
    assert digests[0] != artifacts.read_meta(whole / "checkpoints", 64)["digest"]
    for step in (32, 64, 96):
        first, second = (load_behaviour(r / "snapshots" / f"{step}.npz") for r in runs)
        jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_packaging_copies_the_snapshot_and_documents_it(runs, tmp_path):
    run = runs[0]
    flags = [f"--run_dir={run}", f"--package_dir={tmp_path}", "--package_episodes=3"]
    for name, step in (("second", 64), ("first", 32), ("second", 96)):
        options = [f"--package={name}", f"--snapshot={step}"]
        assert main(["train", *flags, *options]) == 0
    source = run / "snapshots" / "96.npz"
    assert (tmp_path / "second.npz").read_bytes() == source.read_bytes()
    records = json.loads((tmp_path / "policies.json").read_text())
    assert list(records) == ["first.npz", "second.npz"]
    assert records["second.npz"]["snapshot"] == 96
    assert "--total_steps=96" in records["second.npz"]["commands"][0]
    text = (tmp_path / "README.md").read_text()
    assert f"{records['first.npz']['stochastic_score']:.1f}" in text
    assert text.count("--package=second") == 1
    absent = ["--package=third", "--snapshot=33"]
    assert main(["train", *flags, *absent]) == 2


def test_snapshot_layout_acts_as_the_policy_does():
    spec = SpaceSpec(5, 2)
    policy = sac(SacConfig(hidden_sizes=(16, 16), log_std_bounds=(-20.0, 2.0)), spec)
    params = policy.init(jax.random.key(0)).params
    behaviour = to_behaviour(params.actor)
    assert behaviour.spec == spec
    observation = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    mode = policy.act(params, None, jnp.asarray(observation), deterministic=True)
    found = behaviour_act(behaviour, noise=0.0)(jax.random.key(1), observation)
    np.testing.assert_allclose(found, mode, atol=1e-6)
    # The spread: both sample 4096 actions of one observation.
    one = jnp.repeat(observation[:1], 4096, axis=0)
    ours = np.arctanh(np.asarray(policy.act(params, jax.random.key(2), one)))
    theirs = np.arctanh(behaviour_act(behaviour)(jax.random.key(3), np.asarray(one)))
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=4 * np.sqrt(1 / 4096))


def test_collect_keeps_the_fall_and_counts_episodes():
    envs = MujocoBatch("hopper", 2, seed=0)
    envs.reset()
    state = RunState(None, None, None, np.zeros(2), np.array([0, 999]))
    rewards = np.zeros(2)
    for step in range(200):
        before = envs.observation()
        rows, state, finished = collect(envs, state, np.full((2, 3), 0.5, np.float32))
        np.testing.assert_array_equal(rows.observation, np.float32(before))
        rewards += rows.reward
        if step == 0:
            # Environment 1 was at its time limit.
            np.testing.assert_array_equal(rows.truncated, [False, True])
            np.testing.assert_array_equal(state.episode_length, [1, 0])
            np.testing.assert_allclose(finished, [rows.reward[1]], rtol=1e-6)
            continue
        if rows.terminated[0]:
            break
    assert rows.terminated[0]
    assert not rows.truncated[0]
    np.testing.assert_allclose(finished[0], rewards[0], rtol=1e-5)
    # A fallen hopper's height, not the height it restarts from.
    angle = abs(rows.next_observation[0, 1])
    assert angle >= 0.2 or rows.next_observation[0, 0] <= 0.7
    assert envs.observation()[0, 0] > 1.2


def test_bands_are_met_in_order_and_apart():
    config = TrainBehaviourConfig(
        run_dir="x", bands=((30.0, 45.0), (45.0, 65.0)), band_gap=20
    )
    scored = [(10, 50.0), (20, 40.0), (30, 50.0), (40, 70.0), (50, 60.0)]
    rows = [{"step": step, "stochastic_score": score} for step, score in scored]
    assert chosen(config, rows[:4]) == []
    assert chosen(config, rows) == [20, 50]


@pytest.fixture
def idle(monkeypatch):
    """A training that only goes through the motions, with these metrics."""
    metrics = {"q_mean": 1.0}

    def program(config, spec):
        learner = sac(config.sac, spec).init(jax.random.key(0))
        return train_behaviour.Program(lambda key: (learner, None), None, None, None)

    monkeypatch.setattr(train_behaviour, "compile_program", program)
    monkeypatch.setattr(
        train_behaviour,
        "_advance",
        lambda config, program, envs, state, step, until: (state, dict(metrics)),
    )
    return metrics


def test_divergence_is_seen_before_anything_is_saved(tmp_path, idle, capsys):
    idle["q_mean"] = 2e6
    assert main(["train", *SMALL, f"--run_dir={tmp_path / 'run'}"]) == 3
    assert "step 32, q_mean=2e+06 (limit 1e+06)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "snapshots").exists()
    assert artifacts.steps(tmp_path / "run" / "checkpoints") == []


def test_the_signal_is_heard_at_the_last_evaluation_too(tmp_path, idle, monkeypatch):
    left = [32, 64, 96]

    def scores(*_):
        if len(left) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        left.pop(0)
        return {"stochastic_score": 1.0, "deterministic_score": 1.0}

    monkeypatch.setattr(train_behaviour, "scores", scores)
    argv = ["train", *SMALL, f"--run_dir={tmp_path / 'run'}"]
    assert main(argv) == 75
    assert artifacts.steps(tmp_path / "run" / "checkpoints") == [32, 64, 96]
    assert main(argv) == 0
    assert left == []  # nothing was evaluated again


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--env=ant", "known: hopper"),
        ("--num_envs=0", "num_envs=0 must be at least 1"),
        ("--evaluate_every=30", "num_envs=8"),
        ("--total_steps=15000", "evaluate_every=10000"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    flag, message, tmp_path, capsys
):
    assert main(["train", f"--run_dir={tmp_path / 'run'}", flag]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
