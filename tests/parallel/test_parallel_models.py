"""The library's own learners and models, unchanged, on eight devices and on one."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from _lm_models import TINY, random_params, random_tokens
from emfuse_jax import tree
from emfuse_jax.base import SpaceSpec, Transition
from emfuse_jax.data.dataset import gather_history
from emfuse_jax.data.synthetic import linear_gaussian
from emfuse_jax.dynamics import (
    AdetmConfig,
    Batch,
    SamplingConfig,
    adetm,
    fit_scales,
    fuse_dynamics,
    rollout,
    sample_windows,
    uncertainty_weights,
)
from emfuse_jax.evaluation.language import token_log_probs
from emfuse_jax.llm import fuse_language_models, language_model, uniform
from emfuse_jax.parallel import ROW_KEY, data_parallel, make_mesh, shard_rows, split
from emfuse_jax.policies.sac import SacConfig, sac

SPEC = SpaceSpec(observation_size=3, action_size=2)
LAGS = 3
CONFIG = AdetmConfig(
    num_lags=LAGS,
    state_features=16,
    action_features=8,
    num_heads=2,
    head_sizes=(16,),
    energy_sizes=(16,),
    energy_rows=16,
    head_phase=0.0,
    learning_rate=0.05,
    sampling=SamplingConfig(num_steps=2, noise=1.0),
)
LM = dataclasses.replace(TINY, num_layers=1)

pytestmark = [
    pytest.mark.allow_rank_promotion,  # distrax, in SAC's policy
]


@pytest.fixture
def plain_sgd(monkeypatch):
    """Adam divides the scale of a gradient out, and so hides one N times too large."""
    monkeypatch.setattr(optax, "adam", lambda rate, **_: optax.sgd(rate))


@pytest.fixture(scope="module")
def dataset():
    return jax.tree.map(jnp.asarray, linear_gaussian(num_episodes=8, length=20)[0])


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 8})


def three_updates(learner, state, batch):
    def step(state, number):
        return learner.update(
            jax.random.fold_in(jax.random.key(4), number), state, batch
        )

    return jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(3)))(state)


def assert_moved_alike(learner, parallel, state, batch):
    alone, shared = (three_updates(x, state, batch) for x in (learner, parallel))
    chex.assert_trees_all_close(shared, alone, rtol=1e-5, atol=1e-6)
    before, after = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.params)])
                     for s in (state, alone[0]))  # fmt: skip
    # Far more than the tolerance, so eight times the gradient would be seen.
    assert np.max(np.abs(after - before)) > 1e-3


def test_sac(plain_sgd, mesh):
    policy = sac(SacConfig(hidden_sizes=(16,), actor_learning_rate=0.05), SPEC)
    keys = jax.random.split(jax.random.key(0), 4)
    batch = Transition(
        observation=jax.random.normal(keys[0], (16, 3)),
        action=jax.random.uniform(keys[1], (16, 2), minval=-0.9),
        reward=jax.random.normal(keys[2], (16,)),
        next_observation=jax.random.normal(keys[3], (16, 3)),
        terminated=jnp.arange(16) % 3 == 0,
        truncated=jnp.zeros(16, bool),
    )
    parallel = data_parallel(policy, mesh)
    assert parallel.act is policy.act
    assert_moved_alike(policy, parallel, policy.init(jax.random.key(1)), batch)


@pytest.mark.slow
def test_adetm(plain_sgd, mesh, dataset):
    learner = adetm(CONFIG, SPEC)
    batch = sample_windows(jax.random.key(2), dataset, 32, LAGS)
    parallel = data_parallel(
        learner, mesh, batch_axes=Batch(history=1, reward=0, next_observation=0)
    )
    state = learner.init(jax.random.key(1), fit_scales(dataset, LAGS))
    assert_moved_alike(learner, parallel, state, batch)


@pytest.fixture(scope="module")
def fused(dataset):
    """Two untrained experts with chains and slice uncertainty, and histories."""
    learner = adetm(CONFIG, SPEC)
    scales = fit_scales(dataset, LAGS)
    params = tree.stack(
        [learner.init(jax.random.key(seed), scales).params for seed in (0, 1)]
    )
    model = fuse_dynamics(
        learner.model, uncertainty_weights(), sampling=CONFIG.sampling
    )
    # 13 rows: not a multiple of eight.
    return model, params, gather_history(dataset, jnp.arange(30, 43), LAGS)


def test_slice_uncertainty(mesh, fused):
    model, params, history = fused
    shared = shard_rows(model.uncertainty, mesh, in_axes=(None, 1))
    np.testing.assert_allclose(
        jax.jit(shared)(params, history),
        jax.jit(model.uncertainty)(params, history),
        rtol=1e-4,
        atol=1e-6,
    )


def test_fused_predictions_and_their_chains(mesh, fused):
    model, params, history = fused
    axes = (None, ROW_KEY, 1)
    several, alone = (
        jax.jit(shard_rows(model.predict, m, in_axes=axes))(
            params, jax.random.key(3), history
        )
        for m in (mesh, make_mesh({"data": 1}))
    )
    chex.assert_trees_all_close(several, alone, rtol=1e-4, atol=1e-5)
    # The chains are noisy: another key gives other next states.
    other = jax.jit(shard_rows(model.predict, mesh, in_axes=axes))(
        params, jax.random.key(5), history
    )
    gap = jnp.abs(other.next_observation - several.next_observation)
    assert (jnp.max(gap, axis=-1) > 1e-4).all()


@pytest.mark.slow
@pytest.mark.allow_key_reuse  # the check takes a vmapped scan over keys for reuse
def test_rollouts(mesh, fused):
    model, params, history = fused

    def imagine(params, key, history):
        return rollout(
            params,
            key,
            model,
            lambda k, s: jax.random.uniform(k, (*s.shape[:-1], 2), minval=-1.0),
            history,
            4,
            terminated_fn=lambda s, a, following: following[..., 0] > 1.0,
            penalty=0.5,
        )

    several, alone = (
        jax.jit(shard_rows(imagine, m, in_axes=(None, ROW_KEY, 1), out_axes=1))(
            params, jax.random.key(6), history
        )
        for m in (mesh, make_mesh({"data": 1}))
    )
    assert several.reward.shape == (4, 13)
    chex.assert_trees_all_close(several, alone, rtol=1e-4, atol=1e-4)


def test_scores_of_fused_language_models(mesh):
    """Two ways: inputs that lie on the devices, and rows without any exchange."""
    model = fuse_language_models(language_model(LM), uniform(), num_models=2)
    params = tree.stack([random_params(LM, seed) for seed in (0, 1)])
    context, tokens = (random_tokens(seed, (8, 5), LM.vocab_size) for seed in (2, 3))
    texts = (context, jnp.arange(5)[None] >= jnp.arange(8)[:, None] % 4,
             tokens, jnp.ones_like(tokens, bool))  # fmt: skip

    def score(params, *texts):
        return token_log_probs(params, model, *texts).log_probs

    alone = jax.jit(score)(params, *texts)
    placed = jax.jit(score)(params, *(split(text, mesh) for text in texts))
    assert len(placed.sharding.device_set) == 8
    np.testing.assert_allclose(placed, alone, rtol=1e-5, atol=1e-5)
    axes = (None, 0, 0, 0, 0)
    rows = jax.jit(shard_rows(score, mesh, in_axes=axes))(params, *texts)
    np.testing.assert_allclose(rows, alone, rtol=1e-5, atol=1e-5)
    assert len(np.unique(np.round(alone, 4))) > 30
