"""Chunks: windows stay in their episode, plans are executed in order, either way the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import Environment, SpaceSpec, Transition
from emfuse_jax.data.dataset import make_dataset
from emfuse_jax.policies.chunks import (
    ChunkConfig,
    chunk_environment,
    chunk_spec,
    gather_chunks,
    receding_horizon,
)

CONFIG = ChunkConfig(num_frames=3, horizon=4, execute=2)
SPEC = SpaceSpec(1, 1)


@pytest.fixture(scope="module")
def dataset():
    """Three episodes of 5, 1 and 6 steps; a row's number is its observation."""
    ends = np.array([4, 5, 11])
    rows = np.arange(12.0)[:, None]
    done = np.isin(np.arange(12), ends)
    return make_dataset(
        observations=rows,
        actions=rows / 100,
        rewards=rows[:, 0],
        next_observations=rows + 0.5,
        terminals=done & (np.arange(12) != 5),
        timeouts=np.arange(12) == 5,
    )


@pytest.fixture(scope="module")
def gather(dataset):
    return jax.jit(lambda index: gather_chunks(dataset, index, CONFIG))


def test_windows_never_cross_an_episode(gather):
    batch = gather(jnp.arange(12))
    starts = np.array([0] * 5 + [5] + [6] * 6)
    last = np.array([4] * 5 + [5] + [11] * 6)
    index = np.arange(12)
    frames = np.stack([np.maximum(index - lag, starts) for lag in (2, 1, 0)], axis=1)
    chunk = np.stack([np.minimum(index + step, last) for step in range(4)], axis=1)
    np.testing.assert_array_equal(batch.observation, frames)
    np.testing.assert_allclose(batch.action, chunk / 100, rtol=1e-6)
    following = np.concatenate([frames[:, 1:], index[:, None] + 0.5], axis=1)
    np.testing.assert_array_equal(batch.next_observation, following)
    assert batch.terminated.sum() == 2
    assert bool(batch.truncated[5])
    # Windows cut from the rows alone would have crossed.
    assert (np.minimum(index[:, None] + np.arange(4), 11) != chunk).any()


def test_a_batch_of_any_shape_is_gathered(gather):
    batch = gather(jnp.array([[0, 5], [3, 11]]))
    assert batch.observation.shape == (2, 2, 3)
    assert batch.action.shape == (2, 2, 4)
    np.testing.assert_allclose(batch.action[1, 0] * 100, [3, 4, 4, 4], rtol=1e-6)


def plan(params, key, observation, *, deterministic=False):
    """Actions 100 · oldest + newest + step, so that one sees what was read and when."""
    del params, key, deterministic
    newest, oldest = observation[..., -1:], observation[..., :1]
    return (
        100.0 * oldest
        + newest
        + 0.1 * jnp.arange(4.0).reshape((1,) * (observation.ndim - 1) + (4,))
    )


@pytest.fixture(scope="module")
def horizon():
    return receding_horizon(plan, CONFIG, SPEC)


def test_plans_are_made_when_they_run_out_from_the_frames_of_that_time(horizon):
    """As a loop would do it, and inside one scan; two rows that are out of step."""

    def step(state, item):
        observation, done = item
        state, action = horizon.act(None, jax.random.key(0), state, observation)
        return horizon.reset(state, done), action[:, 0]

    time = jnp.arange(6.0)
    observation = jnp.stack([time, 10 + time], axis=1)[..., None]
    done = jnp.zeros((6, 2), bool).at[2, 1].set(True)  # row 1 starts again at time 3
    run = jax.jit(lambda *data: jax.lax.scan(step, horizon.init((2,)), data)[1])
    actions = np.asarray(run(observation, done))
    expected = np.array(
        # 100 · oldest frame + newest at the plan + 0.1 · action's number in the plan
        [
            [0.0, 1010.0],
            [0.1, 1010.1],
            [2.0, 1012.0],
            [2.1, 1313.0],
            [204.0, 1313.1],
            [204.1, 1315.0],
        ]
    )
    np.testing.assert_allclose(actions, expected, rtol=1e-6)


def test_a_plan_is_made_only_when_some_row_needs_one():
    calls = []

    def counted(params, key, observation, *, deterministic=False):
        jax.debug.callback(lambda: calls.append(1))
        return plan(params, key, observation)

    horizon = receding_horizon(counted, CONFIG, SPEC)
    act = jax.jit(functools.partial(horizon.act, None, jax.random.key(0)))
    state = horizon.init((2,))
    for _ in range(6):
        state, action = act(state, jnp.ones((2, 1)))
    jax.block_until_ready(action)
    jax.effects_barrier()
    assert len(calls) == 3


def counter(length):
    """Observes the time, is rewarded with the action, ends after ``length`` steps."""

    def reset(key):
        return jnp.zeros(1), jnp.zeros(1)

    def step(key, state, action):
        following = state + 1
        over = following[0] >= length
        transition = Transition(
            state, action, action[0], following, over, jnp.zeros((), bool)
        )
        return jnp.where(over, 0.0, following), transition

    return Environment(reset, step, lambda state: state, SPEC)


def test_an_environment_of_chunks_executes_part_of_them_and_stops_at_the_end():
    environment = chunk_environment(counter(5), CONFIG)
    assert environment.spec == chunk_spec(CONFIG, SPEC) == SpaceSpec(3, 4)
    key = jax.random.key(0)
    state, observation = environment.reset(key)
    assert observation.tolist() == [0.0] * 3
    step, seen = jax.jit(environment.step), []
    for start in (1.0, 10.0, 100.0):
        state, transition = step(key, state, start + jnp.arange(4.0))
        seen.append(transition)
    # Two actions of each plan, and one of the last: the fifth step ends the episode.
    assert [float(t.reward) for t in seen] == [1 + 2, 10 + 11, 100]
    assert [bool(t.terminated) for t in seen] == [False, False, True]
    assert seen[1].observation.tolist() == [0.0, 1.0, 2.0]
    assert seen[1].next_observation.tolist() == [2.0, 3.0, 4.0]
    assert seen[2].next_observation.tolist() == [3.0, 4.0, 5.0]
    assert environment.observe(state).tolist() == [0.0] * 3  # of the next episode


@pytest.mark.parametrize(
    "settings", [{"execute": 5, "horizon": 4}, {"execute": 0}, {"num_frames": 0}]
)
def test_chunks_that_do_not_fit_are_refused(settings):
    with pytest.raises(ValueError, match="execute="):
        ChunkConfig(**settings)
