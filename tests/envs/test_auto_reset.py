"""Auto-reset keeps the true transition, and tells time limits from terminations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import SpaceSpec
from emfuse_jax.envs import toy
from emfuse_jax.envs.base import auto_reset
from emfuse_jax.loops import scan_steps


def counter(last):
    """Counts from 0; terminates on reaching ``last``; reward is the count before."""
    return toy.from_dynamics(
        SpaceSpec(1, 1),
        lambda key: jnp.zeros(1),
        lambda s, a: (s + 1.0, s[0], s[0] + 1.0 >= last),
    )


def run(env, num_steps, num_envs=2):
    key = jax.random.key(0)
    state, _ = jax.vmap(env.reset)(
        jax.random.split(jax.random.fold_in(key, 99), num_envs)
    )

    def step(step_key, carry):
        keys = jax.random.split(step_key, num_envs)
        carry, transition = jax.vmap(env.step)(keys, carry, jnp.zeros((num_envs, 1)))
        return carry, (transition, jax.vmap(env.observe)(carry), carry.statistics)

    return scan_steps(key, step, state, num_steps)[1]


def test_transition_is_true_across_a_termination_and_the_observation_is_new():
    transition, observed, statistics = run(auto_reset(counter(3.0)), 7)
    column = [0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0]
    np.testing.assert_array_equal(transition.observation[:, 0, 0], column)
    # The state reached at the end of an episode is 3, not the 0 that comes after it.
    np.testing.assert_array_equal(
        transition.next_observation[:, 0, 0], [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0]
    )
    np.testing.assert_array_equal(observed[:, 0, 0], [*column[1:], 1.0])
    np.testing.assert_array_equal(transition.terminated[:, 1], [0, 0, 1, 0, 0, 1, 0])
    assert not transition.truncated.any()
    np.testing.assert_array_equal(statistics.num_episodes[:, 0], [0, 0, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(statistics.last_return[:, 0], [0, 0, 3, 3, 3, 3, 3])
    np.testing.assert_array_equal(statistics.last_length[:, 0], [0, 0, 3, 3, 3, 3, 3])
    np.testing.assert_array_equal(
        statistics.episode_return[:, 0], [0, 1, 0, 0, 1, 0, 0]
    )


def test_time_limit_truncates_and_a_termination_on_the_limit_stays_one():
    transition, observed, _ = run(auto_reset(counter(9.0), max_steps=2), 4)
    np.testing.assert_array_equal(transition.truncated[:, 0], [0, 1, 0, 1])
    assert not transition.terminated.any()
    np.testing.assert_array_equal(transition.next_observation[:, 0, 0], [1, 2, 1, 2])
    np.testing.assert_array_equal(observed[:, 0, 0], [1, 0, 1, 0])
    transition, _, _ = run(auto_reset(counter(2.0), max_steps=2), 4)
    np.testing.assert_array_equal(transition.terminated[:, 0], [0, 1, 0, 1])
    assert not transition.truncated.any()


def test_time_limit_must_be_positive():
    with pytest.raises(ValueError, match="max_steps=0"):
        auto_reset(counter(1.0), max_steps=0)
