"""train_dynamics --model=mcetm, its calibration, and train_policy that is cut by it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _tiny_runs import write_data
from emfuse_jax import artifacts
from emfuse_jax.policies.model_based import ModelBasedConfig
from experiments import fuse_dynamics, train_dynamics, train_policy
from experiments._measure import load_domains
from experiments._truncation import candidates_fn, read_calibration, truncated_model

MODEL = (
    *("--model=mcetm", "--mcetm.energy_sizes=8", "--mcetm.head_sizes=8"),
    *("--mcetm.autoencoder_sizes=8", "--mcetm.batch_size=16", "--mcetm.energy_rows=8"),
    "--mcetm.manifold_rows=4",
    *("--mcetm.num_steps=10", "--chunk=10", "--save_every=1", "--quantile=0.9"),
    *("--candidates.num_candidates=2", "--candidates.sampling.num_steps=2"),
)
CUT = ("--cut=energy", "--candidates.num_candidates=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mcetm")
    data = write_data(folder / "data.hdf5")
    argv = ["train_dynamics", f"--data={data}", f"--run_dir={folder / 'run'}", *MODEL]
    assert train_dynamics.main(argv) == 0
    return folder / "run"


def test_a_run_holds_the_model_and_what_calibrated_its_threshold(run):
    trained = artifacts.load_run(run)
    assert trained.params.autoencoder
    calibration = read_calibration(run)
    assert calibration.candidates.num_candidates == 2
    assert calibration.candidates.sampling.num_steps == 2
    assert calibration.quantile == 0.9
    assert calibration.model == artifacts.tree_digest(trained.params)
    result = json.loads((run / "result.json").read_text())
    assert result["truncate_above"] == calibration.threshold
    assert np.isfinite(calibration.threshold)


def test_a_run_that_is_finished_is_left_as_it_is(run):
    before = (run / "calibration.json").read_bytes()
    data = run.parent / "data.hdf5"
    argv = ["train_dynamics", f"--data={data}", f"--run_dir={run}", *MODEL]
    assert train_dynamics.main(argv) == 0
    assert (run / "calibration.json").read_bytes() == before


def test_another_sampler_is_refused_by_name_before_anything_is_written(
    run, tmp_path, capsys
):
    argv = ["train_policy", f"--model={run}", "--env=hopper", *CUT]
    argv += [f"--run_dir={tmp_path / 'policy'}", "--candidates.num_candidates=3"]
    assert train_policy.main(argv) != 0
    error = " ".join(capsys.readouterr().err.split())  # lines are wrapped
    assert "num_candidates=2, this sampler has num_candidates=3" in error
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("unknown", ["halt", "terminate"])
def test_a_step_into_the_unknown_is_worth_the_least_return_of_the_data(
    run, monkeypatch, unknown
):
    trained = artifacts.load_run(run)
    data = load_domains([str(run.parent / "data.hdf5")], min_length=1)[0].train
    data = jax.tree.map(jnp.asarray, data)
    # One slice doubts nothing: below 0, the threshold makes all of it unknown.
    monkeypatch.setattr(
        train_policy, "truncated_model", lambda *_: (trained.model, -1.0)
    )
    config = train_policy.TrainPolicyConfig(
        cut="energy",
        unknown=unknown,
        rollout=ModelBasedConfig(rollout_rows=4, horizon=1),
    )
    imagine = train_policy.rollout_fn(
        config, trained, data, lambda s, a, n: jnp.zeros(len(s), bool)
    )
    steps = imagine(
        trained.params, jax.random.key(0), lambda key, s: jnp.zeros((len(s), 3)), data
    )
    least = float(np.min(data.reward))
    worth = min(least, least / (1.0 - config.sac.discount))
    assert (steps.transition.reward == np.float32(worth)).all() == (unknown == "halt")
    assert steps.transition.terminated.all()
    assert steps.valid.all()


def test_candidates_of_next_observations(run):
    trained = artifacts.load_run(run)
    following = jax.eval_shape(
        candidates_fn(trained, 4),
        trained.params,
        jax.random.key(0),
        jax.ShapeDtypeStruct((7, 11), np.float32),
        jax.ShapeDtypeStruct((7, 3), np.float32),
    )
    assert following.shape == (4, 7, 11)


def test_a_fusion_of_such_experts_is_calibrated_and_cut_like_one(run, tmp_path):
    """Of two equal experts: the pool is either of them, and so is its threshold."""
    twin, fused = tmp_path / "twin", tmp_path / "fused"
    shutil.copytree(run, twin)
    argv = ["fuse_dynamics", f"--experts={run},{twin}", f"--run_dir={fused}"]
    argv += [*MODEL[-2:], "--quantile=0.9"]
    assert fuse_dynamics.main(argv) == 0
    ours, own = read_calibration(fused), read_calibration(run)
    assert ours.candidates == own.candidates
    np.testing.assert_allclose(ours.threshold, own.threshold, rtol=1e-3)
    written = json.loads((fused / "fusion.json").read_text())
    assert written["truncate_above"] == ours.threshold
    trained = artifacts.load_run(fused)
    _, threshold = truncated_model(fused, trained, ours.candidates)
    assert threshold == ours.threshold
    other = dataclasses.replace(ours.candidates, num_candidates=3)
    with pytest.raises(ValueError, match="this sampler has num_candidates=3"):
        truncated_model(fused, trained, other)
    with pytest.raises(ValueError, match=r"quantile=1.0"):
        fuse_dynamics.FuseDynamicsConfig(quantile=1.0)
