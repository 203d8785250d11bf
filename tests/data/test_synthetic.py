import numpy as np

from _standard_errors import assert_mean_close
from emfuse_jax.data.dataset import episode_bounds
from emfuse_jax.data.synthetic import bump, linear_gaussian


def test_linear_gaussian_rows_follow_the_law():
    data, law = linear_gaussian(num_episodes=100, length=50, noise=0.1)
    residual = data.next_observation - law.mean(data.observation, data.action)
    assert_mean_close(residual, 0.0)
    assert_mean_close(residual**2, 0.1**2)
    np.testing.assert_allclose(
        data.reward, law.reward(data.observation, data.action), atol=1e-5
    )
    starts, ends = episode_bounds(data)
    assert set(ends - starts) == {50}
    assert not data.terminated.any()
    # Consecutive rows of an episode are consecutive steps.
    np.testing.assert_array_equal(data.next_observation[:49], data.observation[1:50])
    # A law that is off by a tenth of the noise is told apart.
    error = np.abs((residual + 0.01).mean(axis=0)) / (0.1 / np.sqrt(len(residual)))
    assert error.min() > 4


def test_bump_jumps_and_the_data_lie_on_both_sides():
    data, law = bump(jump=0.5)
    residual = data.next_observation - law.mean(data.observation, data.action)
    assert np.abs(residual).max() < 1e-6
    left, right = law.mean(np.array([[-1e-9], [1e-9]]), np.zeros((2, 1)))[:, 0]
    np.testing.assert_allclose(left - right, 1.0, atol=1e-6)
    state = data.observation[:, 0]
    for near in ((state > -0.2) & (state < 0), (state > 0) & (state < 0.2)):
        assert near.mean() > 0.1


def test_seeds():
    assert np.array_equal(bump(seed=3)[0].reward, bump(seed=3)[0].reward)
    assert not np.array_equal(bump(seed=3)[0].reward, bump(seed=4)[0].reward)
