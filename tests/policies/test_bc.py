"""Behaviour cloning reaches the entropy of the policy that acted, and no less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import distributions, loops
from emfuse_jax.base import SpaceSpec, Transition
from emfuse_jax.policies.bc import BcConfig, bc, clone_config, warm_start
from emfuse_jax.policies.sac import SacConfig, sac

pytestmark = pytest.mark.allow_rank_promotion  # distrax
SPEC = SpaceSpec(2, 1)
GAIN, STD, ROWS = 0.8, 0.4, 4096


def true_law(observation):
    mean = GAIN * observation[..., :1]
    return mean, jnp.full_like(mean, np.log(STD))


def batch_of(key, rows):
    key_observation, key_action = jax.random.split(key)
    observation = jax.random.normal(key_observation, (rows, SPEC.observation_size))
    action, _ = distributions.sample_and_log_prob(key_action, *true_law(observation))
    nothing = jnp.zeros(rows)
    false = nothing.astype(bool)
    return Transition(observation, action, nothing, observation, false, false)


@pytest.fixture(scope="module")
def trained():
    policy = bc(BcConfig(hidden_sizes=(32,), learning_rate=3e-3), SPEC)

    @jax.jit
    def train(key):
        state = policy.init(key)
        return loops.fit(key, policy, state, lambda k, _: batch_of(k, 256), 1000)[0]

    return policy, train(jax.random.key(0)).params


@pytest.mark.allow_key_reuse
def test_the_held_out_energy_is_the_entropy_of_the_policy_that_acted(trained):
    policy, params = trained
    held_out = batch_of(jax.random.key(7), ROWS)
    energy = policy.energy(params, held_out.observation, held_out.action)
    truth = -distributions.log_prob(*true_law(held_out.observation), held_out.action)
    # Row by row, so that the noise of the actions cancels; what is left is KL(true ‖ clone).
    gap = np.asarray(energy - truth)
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(ROWS) + 0.01
    untrained = bc(BcConfig(hidden_sizes=(32,)), SPEC)
    start = untrained.init(jax.random.key(1)).params
    before = untrained.energy(start, held_out.observation, held_out.action) - truth
    assert float(before.mean()) > 0.1


@pytest.mark.allow_key_reuse
def test_the_clone_acts_as_the_policy_did(trained):
    policy, params = trained
    observation = jnp.array([[0.5, -1.0], [-1.0, 0.3]])
    action = policy.act(params, jax.random.key(0), observation, deterministic=True)
    np.testing.assert_allclose(action, jnp.tanh(GAIN * observation[:, :1]), atol=0.06)
    rows = jnp.repeat(observation[:1], ROWS, axis=0)
    sampled = jnp.arctanh(policy.act(params, jax.random.key(1), rows))
    assert abs(float(sampled.std()) - STD) < 0.05


def test_soft_actor_critic_can_start_at_a_clone():
    config = SacConfig(hidden_sizes=(8,))
    learner = sac(config, SPEC)
    clone = bc(clone_config(config), SPEC).init(jax.random.key(3)).params
    state = warm_start(learner.init(jax.random.key(4)), clone)
    observation = jnp.ones((3, 2))
    cloned = bc(clone_config(config), SPEC).act(
        clone, jax.random.key(5), observation, deterministic=True
    )
    acted = learner.act(
        state.params, jax.random.key(6), observation, deterministic=True
    )
    np.testing.assert_array_equal(acted, cloned)
