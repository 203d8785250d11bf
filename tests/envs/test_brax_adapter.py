"""Brax inside the compiled online loop: true transitions, and resets that are resets."""

import jax
import numpy as np
import pytest

from emfuse_jax.data.buffer import ring_buffer
from emfuse_jax.envs.brax_adapter import brax_environment
from emfuse_jax.loops import scan_steps
from emfuse_jax.policies.online import OnlineConfig, online
from emfuse_jax.policies.sac import SacConfig, sac

pytestmark = [
    pytest.mark.slow,
    # brax multiplies matrices by vectors of lower rank.
    pytest.mark.allow_rank_promotion,
    pytest.mark.filterwarnings("ignore"),
]
NUM_ENVS, NUM_STEPS, NUM_SEEDS = 4, 24, 2


@pytest.fixture(scope="module")
def env():
    return brax_environment("inverted_pendulum", backend="generalized")


@pytest.fixture(scope="module")
def rows(env):
    """What two seeds' replays hold, ``[seed, time, env, …]``, and the last metrics."""
    config = OnlineConfig(num_envs=NUM_ENVS, updates_per_step=1, warmup_steps=80)
    policy = sac(SacConfig(hidden_sizes=(4,)), env.spec)
    buffer = ring_buffer(NUM_ENVS * NUM_STEPS, 4)
    learner = online(env, policy, buffer, config)

    def run(key):
        key_init, key_run = jax.random.split(key)
        state = learner.init(key_init)
        return scan_steps(
            key_run, lambda k, s: learner.update(k, s, None), state, NUM_STEPS
        )

    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    state, metrics = jax.jit(jax.vmap(run))(keys)
    shape = (NUM_SEEDS, NUM_STEPS, NUM_ENVS)
    stored = jax.tree.map(
        lambda leaf: np.reshape(leaf, shape + leaf.shape[3:]), state.replay.experience
    )
    return stored, jax.tree.map(lambda m: m[:, -1], metrics), state


def test_a_fallen_pole_terminates_and_the_next_episode_starts_upright(env, rows):
    stored, metrics, state = rows
    assert env.spec == (4, 1)
    # Brax's rule, in the state that the step reached.
    angle = np.abs(stored.next_observation[..., 1])
    np.testing.assert_array_equal(stored.terminated, angle > 0.2)
    assert stored.terminated.any()
    assert not stored.truncated.any()
    np.testing.assert_array_equal(stored.reward, 1.0)
    ended = stored.terminated[:, :-1]
    following = stored.observation[:, 1:]
    np.testing.assert_array_equal(
        following[~ended], stored.next_observation[:, :-1][~ended]
    )
    assert np.abs(following[ended]).max() <= 0.011  # the noise of a reset
    assert np.sum(metrics["num_episodes"]) == stored.terminated.sum()
    # Updates began after the warm-up's 80 transitions: 20 steps of 4 environments.
    np.testing.assert_array_equal(state.policy.step, NUM_STEPS - 19)
    assert np.isfinite(metrics["critic_loss"]).all()
    # Seeds differ.
    assert np.abs(stored.action[0] - stored.action[1]).max() > 0.1


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match=r"'pendulum'; known: .*inverted_pendulum"):
        brax_environment("pendulum")
    with pytest.raises(ValueError, match=r"'warp'; known: generalized"):
        brax_environment("inverted_pendulum", backend="warp")
