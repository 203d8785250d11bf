"""The toy environments do what their docstrings say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import tree
from emfuse_jax.envs import toy

ALL = (
    toy.constant_reward,
    toy.observed_reward,
    toy.delayed_reward,
    toy.endless_reward,
    toy.best_action,
    toy.matching_action,
    toy.two_state,
    toy.point_mass,
)


def step_from(env, observation, action):
    state = toy.ToyState(jnp.asarray(observation, jnp.float32))
    row = env.step(jax.random.key(0), state, jnp.asarray(action, jnp.float32))[1]
    return (
        [float(x) for x in row.next_observation],
        float(row.reward),
        bool(row.terminated),
    )


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_contract(make):
    env = make()
    state, observation = env.reset(jax.random.key(0))
    assert observation.shape == (env.spec.observation_size,)
    assert observation.dtype == jnp.float32
    action = jnp.full(env.spec.action_size, 0.3)
    new, transition = jax.jit(env.step)(jax.random.key(1), state, action)
    assert tree.same_structure(state, new)
    np.testing.assert_array_equal(transition.observation, observation)
    np.testing.assert_array_equal(transition.next_observation, env.observe(new))
    assert transition.reward.shape == transition.terminated.shape == ()
    assert transition.terminated.dtype == transition.truncated.dtype == bool


def test_probe_rewards():
    assert step_from(toy.constant_reward(), [0.0], [0.2])[1:] == (1.0, True)
    assert step_from(toy.observed_reward(), [-1.0], [0.2])[1:] == (-1.0, True)
    assert step_from(toy.best_action(), [0.0], [0.5])[1:] == (1.0, True)
    assert step_from(toy.best_action(), [0.0], [-0.5])[1:] == (0.0, True)
    assert step_from(toy.matching_action(), [-1.0], [-0.5])[1:] == (1.0, True)
    assert step_from(toy.delayed_reward(), [0.0], [0.2]) == ([1.0], 0.0, False)
    assert step_from(toy.delayed_reward(), [1.0], [0.2]) == ([1.0], 1.0, True)
    assert step_from(toy.endless_reward(), [0.0], [0.2]) == ([0.0], 1.0, False)


def test_two_state_values_solve_the_bellman_equation():
    env, discount = toy.two_state(), 0.9
    value = {-1.0: 0.0, 1.0: 0.0}
    for _ in range(500):
        value = {
            s: max(
                reward + discount * value[following]
                for (following,), reward, _ in (
                    step_from_cached(env, s, a) for a in (-1.0, 1.0)
                )
            )
            for s in value
        }
    best = 1.0 / (1.0 - discount)
    np.testing.assert_allclose(
        [value[1.0], value[-1.0]], [best, -0.5 + discount * best]
    )


_CACHE = {}


def step_from_cached(env, s, a):
    if (s, a) not in _CACHE:
        _CACHE[s, a] = step_from(env, [s], [a])
    return _CACHE[s, a]


def test_point_mass_step_by_hand():
    # Force 0.5 for 0.1 s: velocity 0.2 + 0.05, then position 1 + 0.1 · 0.25.
    following, reward, terminated = step_from(toy.point_mass(), [1.0, 0.2], [0.5])
    np.testing.assert_allclose(following, [1.025, 0.25], rtol=1e-6)
    np.testing.assert_allclose(reward, -(1.0 + 0.1 * 0.04 + 0.01 * 0.25), rtol=1e-6)
    assert not terminated
    clipped = step_from(toy.point_mass(), [1.0, 0.2], [7.0])
    assert clipped == step_from(toy.point_mass(), [1.0, 0.2], [1.0])
