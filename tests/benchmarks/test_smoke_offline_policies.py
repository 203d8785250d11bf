"""The comparison of policies on data runs, resumes, and scales guidance as a policy does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import offline_policies
from emfuse_jax import artifacts
from emfuse_jax.base import SpaceSpec
from emfuse_jax.nets.denoiser import DenoiserConfig
from emfuse_jax.policies._guidance import GuidanceConfig
from emfuse_jax.policies.aepo import AepoConfig, aepo, aepo_model
from emfuse_jax.policies.diffusion import DiffusionConfig
from experiments._run import run_main

FLAGS = (
    *("--envs=pointmaze-umaze", "--methods=bc", "--rows=3000", "--num_updates=2"),
    *("--batch_size=8", "--hidden_sizes=8", "--num_seeds=2", "--episodes=2"),
)


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
    monkeypatch.setenv("EMFUSE_JAX_CACHE", "0")


def test_it_scores_every_method_once(tmp_path, capsys):
    pytest.importorskip("gymnasium_robotics")
    out = tmp_path / "result.json"
    argv = ["offline_policies", *FLAGS, f"--work={tmp_path}/work", f"--out={out}"]
    main = (offline_policies.compare, offline_policies.OfflinePoliciesConfig)
    assert run_main(*main, argv) == 0
    first = artifacts.read_json(out)
    assert set(first["table"]["pointmaze-umaze"]) == {"behaviour", "bc"}
    assert np.shape(first["table"]["pointmaze-umaze"]["bc"]["episodes"]) == (2, 2)
    assert first["data"]["pointmaze-umaze"]["rows"] == 3000
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.json")}
    assert run_main(*main, argv) == 0
    again = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.json")}
    assert again == stamps
    assert artifacts.read_json(out)["table"] == first["table"]
    assert run_main(*main, [*argv, "--episodes=3"]) == 2
    assert "episodes: 2 ≠ 3" in capsys.readouterr().err


def test_a_scale_given_to_act_is_the_scale_of_the_policy():
    spec = SpaceSpec(3, 2)
    tiny = GuidanceConfig(hidden_sizes=(8,), scale=2.0)
    network = DenoiserConfig(hidden_sizes=(8,))
    own = AepoConfig(
        behaviour=DiffusionConfig(network=network, num_steps=3), guidance=tiny
    )
    policy = aepo(own, spec)
    params = jax.jit(lambda key: policy.init(key).params)(jax.random.key(0))
    observation = jnp.ones((4, 3))
    act = offline_policies.scalable_act(aepo_model(own, spec), own, spec)
    found = [
        jax.jit(lambda s: act((params, s), None, observation, deterministic=True))(s)
        for s in (2.0, 0.0)
    ]
    off = dataclasses.replace(own, guidance=dataclasses.replace(tiny, scale=0.0))
    expected = [
        p.act(params, None, observation, deterministic=True)
        for p in (policy, aepo(off, spec))
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-4
