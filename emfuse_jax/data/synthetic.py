"""Small generated data sets whose law is known, for tests, guides and benchmarks."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from emfuse_jax.data.dataset import Dataset, make_dataset


class Law(NamedTuple):
    """The truth behind a synthetic data set, for rows ``[rows, …]`` of NumPy arrays.

    ``mean(observation, action) -> next_observation`` is the conditional mean,
    ``std [obs]`` the standard deviation of the normal noise about it (0: deterministic)
    and ``reward(observation, action) -> reward`` exact.
    """

    mean: Callable[[np.ndarray, np.ndarray], np.ndarray]
    std: np.ndarray
    reward: Callable[[np.ndarray, np.ndarray], np.ndarray]


def linear_gaussian(
    num_episodes: int = 40,
    length: int = 50,
    *,
    observation_size: int = 3,
    action_size: int = 2,
    noise: float = 0.05,
    seed: int = 0,
) -> tuple[Dataset, Law]:
    """A stable linear system: ``s' = A s + B a + noise ε``, ``r = c · s - 0.1 |a|²``.

    ``A`` is 0.9 times a rotation, actions are uniform in [-1, 1], and episodes end by
    timeouts.

    Example:
        >>> dataset, law = linear_gaussian(2, 10, observation_size=4)
        >>> dataset.observation.shape, int(dataset.truncated.sum())
        ((20, 4), 2)
    """
    generator = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(generator.standard_normal((observation_size,) * 2))
    dynamics = 0.9 * rotation
    control = 0.3 * generator.standard_normal((action_size, observation_size))
    direction = generator.standard_normal(observation_size)

    law = Law(
        mean=lambda s, a: s @ dynamics.T + a @ control,
        std=np.full(observation_size, noise),
        reward=lambda s, a: s @ direction - 0.1 * np.sum(np.square(a), axis=-1),
    )
    starts = generator.standard_normal((num_episodes, observation_size))
    return _record(generator, law, starts, length, action_size), law


def bump(
    num_episodes: int = 100,
    length: int = 20,
    *,
    jump: float = 0.5,
    noise: float = 0.0,
    seed: int = 0,
) -> tuple[Dataset, Law]:
    """A point on a line with a discontinuity: the mean jumps by ``2 jump`` at ``s =
    0``.

    ``s' = 0.5 s + 0.3 a - jump · sign(s)`` for the one observation and the one action
    in [-1, 1], ``r = -|s|``. The state is thrown from one side to the other, so the
    data are dense on both sides of the jump, where a smooth regressor must err.

    Example:
        >>> dataset, law = bump(2, 10)
        >>> dataset.observation.shape
        (20, 1)
    """
    generator = np.random.default_rng(seed)
    law = Law(
        mean=lambda s, a: 0.5 * s + 0.3 * a - jump * np.where(s < 0, -1.0, 1.0),
        std=np.full(1, noise),
        reward=lambda s, a: -np.abs(s[..., 0]),
    )
    starts = generator.uniform(-1, 1, (num_episodes, 1))
    return _record(generator, law, starts, length, 1), law


def _record(
    generator: np.random.Generator,
    law: Law,
    starts: np.ndarray,
    length: int,
    action_size: int,
) -> Dataset:
    observation, steps = starts, []
    for _ in range(length):
        action = generator.uniform(-1, 1, (len(starts), action_size))
        noise = law.std * generator.standard_normal(starts.shape)
        following = law.mean(observation, action) + noise
        steps.append((observation, action, law.reward(observation, action), following))
        observation = following
    # Episodes one after another: [time, episode, …] to [episode · time, …].
    arrays = [np.stack(leaf, axis=1) for leaf in zip(*steps, strict=True)]
    arrays = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in arrays]
    ends = np.tile(np.arange(length) == length - 1, len(starts))
    return make_dataset(
        observations=arrays[0],
        actions=arrays[1],
        rewards=arrays[2],
        next_observations=arrays[3],
        terminals=np.zeros(len(ends), bool),
        timeouts=ends,
    )
