"""Push-T through gym-pusht: the expert covers the outline, and its episodes are a data set."""

import jax
import numpy as np
import pytest

from emfuse_jax.data.dataset import episode_bounds, make_dataset
from emfuse_jax.envs.pusht import (
    SUCCESS,
    PusherConfig,
    d4rl_arrays,
    make_pusht,
    observe,
    play,
    scripted_pusher,
)

pytest.importorskip("gym_pusht")


@pytest.fixture(scope="module")
def episodes():
    env, simulator = make_pusht(), make_pusht()
    config = PusherConfig(num_candidates=24)

    def one(seed, max_steps):
        pusher = scripted_pusher(config, np.random.default_rng(seed), simulator)
        return play(env, pusher, seed, max_steps=max_steps)

    return [one(0, 300), one(2, 300), one(3, 20)]


def test_the_expert_covers_the_outline_and_a_disc_at_rest_does_not(episodes):
    for episode in episodes[:2]:
        assert episode.succeeded
        assert episode.coverage[0] < 0.6
        assert len(episode.action) < 300
        assert np.abs(episode.action).max() <= 1.0
    rest = play(make_pusht(), lambda observation: observation[:2], 0, max_steps=20)
    assert not rest.succeeded
    np.testing.assert_allclose(rest.coverage, rest.coverage[0], atol=0.02)


def test_an_episode_is_what_gym_pusht_does_with_its_actions(episodes):
    episode, env = episodes[1], make_pusht()
    state, _ = env.reset(seed=2)
    np.testing.assert_allclose(episode.observation[0], observe(state), atol=1e-6)
    for action, following in zip(episode.action, episode.next_observation, strict=True):
        state, reward, done, _, _ = env.step((np.float64(action) + 1) * 256)
        np.testing.assert_allclose(following, observe(state), atol=1e-3)
    assert done
    assert reward == 1.0


def test_episodes_become_a_data_set(episodes):
    arrays = d4rl_arrays(episodes)
    data = make_dataset(**arrays, source="Push-T")
    starts, ends = episode_bounds(data)
    lengths = [len(episode.action) for episode in episodes]
    np.testing.assert_array_equal(ends - starts, lengths)
    np.testing.assert_array_equal(data.terminated[ends - 1], [True, True, False])
    np.testing.assert_array_equal(data.truncated[ends - 1], [False, False, True])
    assert data.terminated.sum() == 2
    np.testing.assert_allclose(data.reward, np.clip(arrays["rewards"], 0, 1), rtol=1e-6)
    assert (data.reward[ends - 1][:2] == 1.0).all()
    assert data.reward[ends[-1] - 1] < SUCCESS
    jax.tree.map(lambda leaf: np.testing.assert_equal(len(leaf), sum(lengths)), data)


def test_refusals():
    with pytest.raises(ValueError, match="no episodes"):
        d4rl_arrays([])
    with pytest.raises(ValueError, match="max_steps=0"):
        play(make_pusht(), lambda o: o[:2], 0, max_steps=0)
    with pytest.raises(ValueError, match="two finite numbers"):
        play(make_pusht(), lambda o: o[:2] * np.nan, 0, max_steps=3)
