"""Pessimism by how values differ between candidates of the next observation."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import Policy, SpaceSpec, Transition
from emfuse_jax.data.dataset import make_dataset
from emfuse_jax.policies.model_based import Imagined, ModelBasedConfig, model_based
from emfuse_jax.policies.sac import SacConfig, critic_target, sac

SPEC = SpaceSpec(observation_size=2, action_size=1)
CONFIG = SacConfig(hidden_sizes=(8,), dispersion=2.0)


class State(NamedTuple):
    params: jax.Array


def batch_of(rows=6, candidates=None):
    keys = jax.random.split(jax.random.key(0), 3)
    following = jax.random.normal(keys[2], (rows, 2))
    if candidates is not None:
        following = jnp.broadcast_to(following[None], (candidates, rows, 2))
    return Transition(
        observation=jax.random.normal(keys[0], (rows, 2)),
        action=jnp.tanh(jax.random.normal(keys[1], (rows, 1))),
        reward=jnp.ones(rows),
        next_observation=following,
        terminated=jnp.arange(rows) % 3 == 0,
        truncated=jnp.zeros(rows, bool),
    )


def test_the_target_by_hand():
    # Candidates worth min(4, 5) = 4 and min(3, 2) = 2, and log π = -1 at α = 0.5:
    # values 4.5 and 2.5, mean 3.5, std 1.
    q = jnp.array([[[4.0], [3.0]], [[5.0], [2.0]]])
    log_prob = jnp.full((2, 1), -1.0)
    one, go = jnp.ones(1), jnp.array([False])

    def target(dispersion, end=go):
        return float(
            critic_target(
                one,
                end,
                q,
                log_prob,
                temperature=0.5,
                discount=0.9,
                dispersion=dispersion,
            )[0]
        )

    assert target(0.0) == pytest.approx(1 + 0.9 * 3.5)
    assert target(2.0) == pytest.approx(1 + 0.9 * (3.5 - 2 * 1.0))
    assert target(2.0, ~go) == pytest.approx(1.0)


def test_equal_candidates_change_nothing_since_they_share_the_policys_noise():
    """P4: noise of one's own for every candidate would pass for dispersion."""
    pessimistic = sac(CONFIG, SPEC)
    plain = sac(dataclasses.replace(CONFIG, dispersion=0.0), SPEC)
    state = jax.jit(plain.init)(jax.random.key(1))

    @jax.jit
    def losses(state):
        key = jax.random.key(2)
        return (
            plain.update(key, state, batch_of())[1]["critic_loss"],
            pessimistic.update(key, state, batch_of(candidates=3))[1]["critic_loss"],
        )

    with jax.debug_key_reuse(False):
        expected, found = losses(state)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dispersion_without_candidates_is_refused_and_so_is_optimism():
    policy = sac(CONFIG, SPEC)
    state = jax.eval_shape(policy.init, jax.random.key(1))
    with pytest.raises(ValueError, match=r"dispersion=2.0 needs candidates.*\(6, 2\)"):
        jax.eval_shape(policy.update, jax.random.key(2), state, batch_of())
    with pytest.raises(ValueError, match=r"dispersion=-1.0; expected"):
        SacConfig(dispersion=-1.0)


def test_recorded_rows_have_one_candidate_and_imagined_rows_several():
    """The penalty is zero where the next observation is known, as in MOBILE."""
    config = ModelBasedConfig(
        rollout_rows=4,
        horizon=1,
        retain=1,
        updates_per_rollout=1,
        batch_size=8,
        real_ratio=0.5,
    )

    def update(key, state, batch):
        del key
        spread = jnp.std(batch.next_observation, axis=0).max(axis=-1)
        real = batch.reward < 0
        return state, {
            "real": jnp.max(jnp.where(real, spread, 0.0)),
            "imagined": jnp.min(jnp.where(real, jnp.inf, spread)),
        }

    policy = Policy(
        lambda key: State(jnp.zeros(())),
        update,
        lambda params, key, x: x[:, :1],
        None,
    )

    def imagine(params, key, act, data):
        del key, act, data
        return Imagined(batch_of(4), jnp.ones(4, bool), jnp.zeros(4))

    def candidates_fn(params, key, observation, action):
        assert action.shape == (4, 1)
        noise = jax.random.normal(key, (5, *observation.shape))
        return observation[None] + params * noise

    learner = model_based(policy, imagine, config, SPEC, candidates_fn=candidates_fn)
    states = np.zeros((10, 2))
    data = make_dataset(
        observations=states,
        actions=np.zeros((10, 1)),
        rewards=-np.ones(10),
        next_observations=states,
        terminals=np.zeros(10, bool),
        timeouts=np.arange(10) == 9,
    )
    data = jax.tree.map(jnp.asarray, data)

    def one(key, scale):
        state = learner.init(jax.random.key(0))
        return learner.update(key, state, (scale, data))[1]

    metrics = jax.jit(one)(jax.random.key(3), jnp.float32(1.0))
    assert float(metrics["real"]) == 0.0
    assert float(metrics["imagined"]) > 0.1
