"""The batched maze is gymnasium-robotics' own, and its controller finds the way."""

import jax
import numpy as np
import pytest

from emfuse_jax.envs.pointmaze import GOAL_RADIUS, PointMazeBatch, waypoint_act
from emfuse_jax.evaluation.episodes import collect, evaluate

pytest.importorskip("gymnasium_robotics")


@pytest.fixture(scope="module")
def env():
    return PointMazeBatch("pointmaze-umaze", 4)


def test_steps_equal_gymnasium_robotics_bit_for_bit(env):
    import gymnasium
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    peer = gymnasium.make("PointMaze_UMaze-v3", continuing_task=True)
    peer.reset(seed=0)
    inner = peer.unwrapped
    env.seed(3)
    ours = env.reset()
    inner.point_env.set_state(ours[0, :2], ours[0, 2:])
    inner.goal = env.goal.copy()
    inner.reset_target = False
    rng, rewards = np.random.default_rng(0), 0.0
    for step in range(400):
        action = rng.uniform(-1.2, 1.2, (4, 2)) + 0.4 * np.sin(0.02 * step)
        observation, reward, terminated = env.step(action)
        theirs, their_reward, their_end, _, _ = inner.step(action[0])
        np.testing.assert_array_equal(observation[0], theirs["observation"])
        assert (reward[0], terminated[0]) == (their_reward, their_end)
        rewards += reward[0]
    assert np.abs(ours[0, :2] - observation[0, :2]).max() > 0.1
    peer.close()


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (np.full((4, 2), np.inf), "8 action values are NaN or infinite"),
        (np.zeros((3, 2)), "actions have shape \\(3, 2\\)"),
    ],
)
def test_a_refused_action_leaves_the_balls_where_they_were(env, action, text):
    """An infinite one too, although it could be clipped."""
    env.seed(3)
    env.reset()
    env._data[0].qvel[:] = 9.0
    before = env.get_state()
    with pytest.raises(ValueError, match=text):
        env.step(action)
    np.testing.assert_array_equal(env.get_state().simulator, before.simulator)
    position, velocity = env.positions()
    with pytest.raises(ValueError, match=text):
        env.oracle_step(position, velocity, action)


def test_starts_are_free_cells_away_from_the_goal(env):
    env.seed(0)
    starts = np.concatenate([env.reset() for _ in range(50)])
    assert not env.reward(starts).any()
    cells = {tuple(env.maze.cell_xy_to_rowcol(xy)) for xy in starts[:, :2]}
    assert cells == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2)}
    np.testing.assert_array_equal(starts[:, 2:], 0.0)


def test_the_controller_reaches_the_goal_from_everywhere_and_stays(env):
    act = waypoint_act(env, noise=0.0, goal=env.goal)
    stats = evaluate(jax.random.key(0), env, act, 8, max_steps=env.max_steps)
    assert stats.returns.min() > 50
    assert (stats.lengths == 300).all()


def test_recordings_of_random_goals_are_reproducible_and_cover_the_maze(env):
    def record():
        act = waypoint_act(env)
        return collect(jax.random.key(1), env, act, 2400, max_steps=env.max_steps)

    first, again = record(), record()
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    at_goal = first["rewards"].mean()
    assert 0.02 < at_goal < 0.5
    assert not first["terminals"].any()
    position = first["next_observations"][:, :2]
    near = np.linalg.norm(position - env.goal, axis=1) <= GOAL_RADIUS
    np.testing.assert_array_equal(first["rewards"], near)


def test_unknown_mazes_are_refused():
    with pytest.raises(ValueError, match="known: pointmaze-umaze"):
        PointMazeBatch("pointmaze-huge", 1)
