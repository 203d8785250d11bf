"""Divergence ends a run before it is saved, or sends it back with smaller steps."""

import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

import _tiny_runs as tiny
import _toy_main as toy_main
from emfuse_jax import artifacts
from emfuse_jax.base import Learner
from experiments import _divergence, train_dynamics
from experiments.presets import adetm, sac
from experiments.train_policy import TrainPolicyConfig


@pytest.fixture(scope="module", autouse=True)
def _no_compilation_cache():
    os.environ["EMFUSE_JAX_CACHE"] = "0"
    yield
    del os.environ["EMFUSE_JAX_CACHE"]


@pytest.fixture
def fragile(monkeypatch):
    """The toy diverges in its 24th update unless its learning rate is below 0.02."""
    make = toy_main.toy_learner

    def toy_learner(config):
        learner = make(config)

        def update(key, state, batch):
            state, metrics = learner.update(key, state, batch)
            breaks = (state.optimizer[0].count == 24) & (config.learning_rate > 0.02)
            broken = jnp.where(breaks, math.nan, state.params)
            return state._replace(params=broken), metrics

        return Learner(learner.init, update)

    monkeypatch.setattr(toy_main, "toy_learner", toy_learner)


def _main(path, *flags):
    return toy_main.main(["toy_main.py", f"--run_dir={path}", *flags])


def _state(path):
    rows = [{k: v for k, v in r.items()} for r in tiny.rows_of(path)]
    return (
        rows,
        tiny.digests(path / "checkpoints"),
        artifacts.read_json(path / "result.json"),
    )


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"loss": 1.0, "anything": math.nan}, "anything=nan: not a finite number"),
        ({"loss": [1.0, math.inf]}, "loss=inf"),
        ({"q_mean": -2e6}, "q_mean=-2e+06 (limit 1e+06): Q explodes"),
        ({"energy_gap": 2e4}, "energy_gap=20000 (limit 10000): the energy gap runs"),
        ({"gap": 2e4}, "the energy gap runs away"),
        ({"critic_loss": 2e12}, "the loss runs away"),
    ],
)
def test_what_has_diverged_is_named(metrics, words):
    assert words in str(_divergence.find(metrics))


def test_what_healthy_runs_show_is_let_through():
    """The largest numbers of trained policies and models, and a metric without a rule."""
    seen = {"q_mean": 259.5, "critic_loss": 9090.9, "gradient_norm": 3.4, "rows": 1e9}
    params = {"w": jnp.ones(3), "count": jnp.zeros((), jnp.int32)}
    assert _divergence.find(seen | {"loss": np.array([1.0, 2.0])}, params) is None
    params["w"] = params["w"].at[1].set(jnp.nan)
    assert "params['w']" in str(_divergence.find(seen, params))


def test_a_diverged_run_stops_and_names_the_last_good_checkpoint(
    tmp_path, capsys, fragile
):
    path = tmp_path / "run"
    assert _main(path) == _divergence.EXIT_STATUS == 3
    error = capsys.readouterr().err
    assert "diverged at step 25, " in error
    assert "params=nan" in error or "loss=nan" in error
    assert f"last good one: {path}/checkpoints/20" in error
    assert "--on_divergence=rollback" in error
    assert "Traceback" not in error
    assert artifacts.steps(path / "checkpoints") == [10, 20]
    assert tiny.rows_of(path)[-1]["step"] == 25


def test_a_model_that_diverges_is_stopped_by_its_own_metrics(tmp_path, capsys):
    """The real command: an ETM whose first step is far too large."""
    data = tiny.write_data(tmp_path / "data.hdf5")
    flags = ("--model=etm", "--etm.energy_sizes=8", "--etm.head_sizes=8")
    flags += ("--etm.batch_size=16", "--etm.energy_rows=8", "--etm.num_steps=20")
    flags += (
        "--etm.learning_rate=1e9",
        "--chunk=5",
        f"--data={data}",
        f"--run_dir={tmp_path / 'run'}",
    )
    assert train_dynamics.main(["train_dynamics.py", *flags]) == 3
    error = capsys.readouterr().err
    assert "diverged at step 5, " in error
    assert "last good one: none, it would begin anew" in error
    assert artifacts.steps(tmp_path / "run" / "checkpoints") == []


def test_rolled_back_runs_go_on_with_smaller_steps(tmp_path, capsys, fragile):
    first, second = tmp_path / "first", tmp_path / "second"
    assert _main(first, "--on_divergence=rollback") == 0
    assert "learning rates are scaled by 0.25" in capsys.readouterr().err
    record = artifacts.read_json(first / _divergence.ROLLBACK_FILE)
    assert [entry["learning_rate_scale"] for entry in record] == [0.5, 0.25]
    assert [entry["step"] for entry in record] == [25, 25]
    assert record[0]["checkpoint"] == str(first / "checkpoints" / "20")
    config = artifacts.read_json(first / "config.json")["config"]
    assert config["learning_rate"] == 0.05  # what was asked for
    # Stopped first, rolled back later, and opened once more: the same.
    assert _main(second) == 3
    assert _main(second, "--on_divergence=rollback") == 0
    assert _main(second) == 0
    assert _state(first) == _state(second)
    # Up to the checkpoint it is the run with the large steps, afterwards it is not.
    assert _main(tmp_path / "small", "--learning_rate=0.0125") == 0
    assert _state(tmp_path / "small")[1].keys() == _state(first)[1].keys()
    assert _state(tmp_path / "small")[1] != _state(first)[1]


def test_rolling_back_ends(tmp_path, capsys, fragile):
    path = tmp_path / "run"
    flags = ("--learning_rate=10", "--on_divergence=rollback")
    assert _main(path, *flags) == 3
    assert "not rolled back: 5 times are enough" in capsys.readouterr().err
    assert len(artifacts.read_json(path / _divergence.ROLLBACK_FILE)) == 5


def test_every_learning_rate_is_scaled_and_back_exactly():
    config = TrainPolicyConfig(sac=sac("paper"))
    half = _divergence.rescale(config, 0.5)
    assert half.sac.actor_learning_rate == 0.5e-4
    assert half.sac.critic_learning_rate == 1.5e-4
    assert _divergence.rescale(half, 2.0) == config
    data = artifacts.to_json(adetm("paper"))
    assert _divergence.rescale(_divergence.rescale(data, 2**-5), 2**5) == data
