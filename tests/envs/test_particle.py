"""Particle moves as published, its oracle succeeds, and only the right thing is paid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.envs.particle import (
    ParticleConfig,
    collect_demonstrations,
    integrate,
    particle,
    particle_oracle,
    succeeded,
)
from emfuse_jax.evaluation.episodes import evaluate_jittable

CONFIG = ParticleConfig(num_dims=2)
EPISODES = 64


@pytest.fixture(scope="module")
def demonstrations():
    collect = jax.jit(lambda key: collect_demonstrations(key, CONFIG, EPISODES))
    return collect(jax.random.key(0))


def test_a_control_step_is_ten_of_position_first_then_velocity():
    x, v = np.array([0.2, 0.9]), np.array([0.5, -1.0])
    action = np.array([0.6, -1.4])  # clipped to the cube: set-points 0.8 and 0
    target = np.array([0.8, 0.0])
    other_x, other_v = x.copy(), v.copy()
    for _ in range(10):
        force = 10.0 * (target - x) - 5.0 * v
        x, v = x + 0.005 * v, v + 0.005 * force
        other_v = other_v + 0.005 * (10.0 * (target - other_x) - 5.0 * other_v)
        other_x = other_x + 0.005 * other_v
    moved, speed = integrate(
        CONFIG, jnp.array([0.2, 0.9]), jnp.array([0.5, -1.0]), jnp.asarray(action)
    )
    np.testing.assert_allclose(moved, x, atol=1e-6)
    np.testing.assert_allclose(speed, v, atol=1e-6)
    assert np.abs(other_x - x).max() > 5e-4  # velocity first would be told apart


def test_the_oracle_succeeds_and_its_steps_are_one_chain(demonstrations):
    transition, success = demonstrations
    assert np.asarray(success).mean() == 1.0
    assert transition.observation.shape == (50, EPISODES, 8)
    np.testing.assert_array_equal(
        transition.observation[1:], transition.next_observation[:-1]
    )
    np.testing.assert_array_equal(transition.reward.sum(0), success.astype(np.float32))
    np.testing.assert_array_equal(transition.truncated[-1], np.ones(EPISODES, bool))
    assert not np.asarray(transition.truncated[:-1]).any()
    assert not np.asarray(transition.terminated).any()


def test_the_oracle_switches_goals_once(demonstrations):
    transition = jax.tree.map(np.asarray, demonstrations.transition)
    position, _, first, second = np.split(transition.observation, 4, axis=-1)
    at_first = np.all(transition.action == 2 * first - 1, axis=-1)
    at_second = np.all(transition.action == 2 * second - 1, axis=-1)
    assert (at_first ^ at_second).all()
    assert (np.diff(at_second.astype(int), axis=0) >= 0).all()
    switch = at_second.argmax(0)
    near = np.linalg.norm(position - first, axis=-1)[switch, np.arange(EPISODES)]
    assert near.max() < 0.01


def rest_at(position):
    env = particle(CONFIG)
    state, _ = env.reset(jax.random.key(1))
    return state._replace(
        position=jnp.asarray(position),
        first_goal=jnp.array([0.2, 0.2]),
        second_goal=jnp.array([0.8, 0.8]),
        step=jnp.array(49),
    )


@pytest.mark.parametrize(
    ("start", "visited", "success", "visits_pay"),
    [
        ([0.8, 0.8], (True, False), True, True),
        ([0.8, 0.8], (False, False), False, False),  # the second goal comes second
        ([0.2, 0.2], (True, True), False, True),  # both visited, but not at rest there
        ([0.84, 0.84], (True, False), False, False),  # 0.057 away
    ],
)
def test_what_is_paid(start, visited, success, visits_pay):
    state = rest_at(start)._replace(
        visited_first=jnp.array(visited[0]), visited_second=jnp.array(visited[1])
    )
    action = 2.0 * state.position - 1.0
    following, transition = particle(CONFIG).step(jax.random.key(0), state, action)
    assert bool(succeeded(CONFIG, following)) == success
    assert float(transition.reward) == float(success)
    lenient = particle(dataclasses.replace(CONFIG, must_rest=False))
    assert float(lenient.step(jax.random.key(0), state, action)[1].reward) == visits_pay
    early = state._replace(step=jnp.array(10))
    assert float(particle(CONFIG).step(jax.random.key(0), early, action)[1].reward) == 0


def test_a_push_moves_the_point_once_and_the_policy_sees_it():
    config = dataclasses.replace(CONFIG, num_steps=80, push_step=30, push_distance=0.3)
    collect = jax.jit(lambda key: collect_demonstrations(key, config, EPISODES))
    transition, success = jax.tree.map(np.asarray, collect(jax.random.key(0)))
    assert success.mean() == 1.0  # the oracle has the time to recover
    before = transition.observation[..., :2], transition.observation[..., 2:4]
    moved, _ = jax.vmap(jax.vmap(lambda *a: integrate(config, *a)))(
        *before, transition.action
    )
    jump = np.linalg.norm(transition.next_observation[..., :2] - moved, axis=-1)
    assert jump[np.arange(80) != 29].max() < 1e-5
    assert (jump[29] <= 0.3 + 1e-5).all()
    inside = np.all(np.abs(moved[29] - 0.5) < 0.2, axis=-1)
    np.testing.assert_allclose(jump[29][inside], 0.3, atol=1e-5)
    np.testing.assert_array_equal(
        transition.observation[30], transition.next_observation[29]
    )


def test_a_policy_without_memory_that_skips_the_first_goal_fails():
    def skip(key, observation):
        del key
        return 2.0 * observation[..., 6:] - 1.0

    run = jax.jit(
        lambda key: evaluate_jittable(key, particle(CONFIG), skip, 64, max_steps=50)
    )
    stats = run(jax.random.key(3))
    assert np.asarray(stats.returns).mean() < 0.1
    assert (np.asarray(stats.lengths) == 50).all()


def test_refusals():
    with pytest.raises(ValueError, match="num_dims=0"):
        ParticleConfig(num_dims=0)
    with pytest.raises(ValueError, match="push_step=50"):
        ParticleConfig(push_step=50)
    with pytest.raises(ValueError, match="tolerance=0"):
        ParticleConfig(tolerance=0.0)
    with pytest.raises(ValueError, match="switch_distance=0"):
        particle_oracle(switch_distance=0.0)
