import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import Environment, SpaceSpec, Transition
from emfuse_jax.data.behaviour import random_act
from emfuse_jax.data.dataset import episode_bounds, make_dataset
from emfuse_jax.envs.mujoco_batch import MujocoBatch
from emfuse_jax.evaluation.episodes import collect, evaluate, evaluate_jittable, roll

KEYS = (
    "observations",
    "actions",
    "rewards",
    "next_observations",
    "terminals",
    "timeouts",
)


def test_evaluate_equals_episodes_played_one_by_one():
    act = jax.jit(lambda key, observation: jnp.tanh(observation[:, 5:8] - 0.1))
    env = MujocoBatch("hopper", 3)
    stats = evaluate(jax.random.key(0), env, act, 5, max_steps=60)
    assert stats.returns.shape == stats.lengths.shape == (5,)
    key_seed, _ = jax.random.split(jax.random.key(0))
    env.seed(int(jax.random.bits(key_seed, dtype=jnp.uint32)))
    expected = []
    for _ in range(2):
        first = env.reset()
        for i in range(3):
            single = MujocoBatch("hopper", 1)
            state = env.get_state()
            single.set_state(state._replace(simulator=state.simulator[i : i + 1]))
            observation, total, length, done = first[i : i + 1], 0.0, 0, False
            while not done and length < 60:
                action = np.asarray(act(None, observation.astype(np.float32)))
                observation, reward, terminated = single.step(action)
                total, length, done = total + reward[0], length + 1, terminated[0]
            expected.append((total, length))
    expected = np.array(expected[:5])
    np.testing.assert_allclose(stats.returns, expected[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(stats.lengths, expected[:, 1])
    # The episodes differ in length, so mixing them up would have shown.
    assert len(set(stats.lengths.tolist())) > 1


def test_evaluate_depends_on_the_key_only():
    env, act = MujocoBatch("walker2d", 2), random_act(6)
    first = evaluate(jax.random.key(1), env, act, 2, max_steps=40)
    again = evaluate(jax.random.key(1), env, act, 2, max_steps=40)
    other = evaluate(jax.random.key(2), env, act, 2, max_steps=40)
    np.testing.assert_array_equal(first.returns, again.returns)
    assert not np.array_equal(first.returns, other.returns)


def test_time_limit_and_bad_counts():
    env = MujocoBatch("halfcheetah", 2)
    stats = evaluate(jax.random.key(0), env, random_act(6), 2, max_steps=7)
    assert stats.lengths.tolist() == [7, 7]
    with pytest.raises(ValueError, match="num_episodes=0"):
        evaluate(jax.random.key(0), env, random_act(6), 0)
    with pytest.raises(ValueError, match="num_steps=1"):
        collect(jax.random.key(0), env, random_act(6), 1)


@pytest.fixture(scope="module")
def recording():
    env = MujocoBatch("hopper", 4)
    progress = []
    arrays = collect(
        jax.random.key(3),
        env,
        random_act(3),
        402,
        max_steps=25,
        on_step=progress.append,
    )
    return env, arrays, progress


def test_collected_rows_are_the_simulators_steps(recording):
    env, arrays, progress = recording
    assert sum(progress) == len(arrays["rewards"]) == 402
    following, reward, terminated = env.oracle_step(
        arrays["qpos"], arrays["qvel"], arrays["actions"]
    )
    np.testing.assert_allclose(following, arrays["next_observations"], atol=1e-5)
    np.testing.assert_allclose(reward, arrays["rewards"], atol=1e-5)
    np.testing.assert_array_equal(terminated, arrays["terminals"])


def test_collected_episodes_are_whole(recording):
    _, arrays, _ = recording
    data = make_dataset(**{key: arrays[key] for key in KEYS})
    starts, ends = episode_bounds(data)
    inside = np.setdiff1d(np.arange(402), ends - 1)
    np.testing.assert_array_equal(
        data.next_observation[inside], data.observation[inside + 1]
    )
    # Each episode starts at rest and none outlives the limit.
    assert np.abs(arrays["qvel"][starts]).max() <= 5e-3
    assert (ends - starts).max() <= 25
    # Some end by falling, some by the limit, and the four streams are cut at their
    # ends.
    assert data.terminated.sum() > 5
    streams = np.cumsum([101, 101, 100, 100]) - 1
    assert (data.terminated | data.truncated)[streams].all()
    early = data.truncated & (data.age < 24)
    assert set(np.flatnonzero(early)) <= set(streams)


def test_roll_rests_or_restarts():
    env = MujocoBatch("hopper", 2)
    steps = list(
        roll(jax.random.key(0), env, random_act(3), max_steps=30, restart=False)
    )
    live = np.array([step.live for step in steps])
    done = np.array([step.terminated | step.truncated for step in steps])
    assert done.sum(axis=0).tolist() == [1, 1]
    np.testing.assert_array_equal(live.sum(axis=0), np.argmax(done, axis=0) + 1)
    restarted = roll(jax.random.key(0), env, random_act(3), max_steps=5)
    ends = [next(restarted).truncated.all() for _ in range(20)]
    assert np.flatnonzero(ends).tolist() == [4, 9, 14, 19]


def counter():
    """Counts steps; the reward is the count; ends at a limit drawn at the reset."""

    def reset(key):
        state = (jnp.int32(0), jax.random.randint(key, (), 2, 9))
        return state, observe(state)

    def observe(state):
        return jnp.stack(state).astype(jnp.float32)

    def step(key, state, action):
        following = (state[0] + 1, state[1])
        transition = Transition(
            observe(state),
            action,
            following[0].astype(jnp.float32),
            observe(following),
            following[0] >= following[1],
            jnp.array(False),
        )
        return following, transition

    return Environment(reset, step, observe, SpaceSpec(2, 1))


def test_evaluate_jittable_counts_first_episodes_only():
    def policy(key, observation):
        return jnp.zeros((*observation.shape[:-1], 1))

    run = jax.jit(
        lambda key: evaluate_jittable(key, counter(), policy, 20, max_steps=12)
    )
    stats = run(jax.random.key(0))
    lengths = np.asarray(stats.lengths)
    assert set(lengths) <= set(range(2, 9))
    assert len(set(lengths)) > 2
    # 1 + 2 + … + n, and nothing of the steps after the end.
    np.testing.assert_allclose(stats.returns, lengths * (lengths + 1) / 2)
