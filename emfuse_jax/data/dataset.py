"""Offline data: checked arrays, where episodes begin and end, and windows of history.

Rows are environment steps in the order in which they were recorded. ``age`` counts the
steps since the episode's start, so a row alone says how much history it has and a
window can never reach into the episode before it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import History, Transition

AnyArray = Array | np.ndarray
"""Data may live on the host or on a device."""

ACTION_TOLERANCE = 1e-6
"""Actions may leave [-1, 1] by this much (float32 rounding of a tanh)."""


class Dataset(NamedTuple):
    """Recorded steps, NumPy or JAX arrays, in raw units.

    ``terminated`` and ``truncated`` exclude each other and every episode's last row has
    one of them. ``age`` is 0 on an episode's first row.
    """

    observation: Float[AnyArray, "rows obs"]
    action: Float[AnyArray, "rows act"]
    reward: Float[AnyArray, "rows"]
    next_observation: Float[AnyArray, "rows obs"]
    terminated: Bool[AnyArray, "rows"]
    truncated: Bool[AnyArray, "rows"]
    age: Int[AnyArray, "rows"]


def make_dataset(
    *,
    observations: Any = None,
    actions: Any = None,
    rewards: Any = None,
    next_observations: Any = None,
    terminals: Any = None,
    timeouts: Any = None,
    min_length: int = 1,
    source: str = "data",
) -> Dataset:
    """Checks D4RL-style arrays and builds a `Dataset` of NumPy arrays.

    Nothing is built before everything is checked. A file that ends inside an episode
    counts as truncated there; a step that is both terminal and timed out counts as
    terminal.

    Args:
        observations: ``[rows, obs]``.
        actions: ``[rows, act]`` in [-1, 1].
        rewards: ``[rows]``.
        next_observations: ``[rows, obs]``, before any reset.
        terminals: ``[rows]``, the step ended the episode for good.
        timeouts: ``[rows]``, the step was the recording's last for this episode.
        min_length: the shortest episode that the caller can use (its window).
        source: what error texts call the data (a file name).

    Returns:
        The data set, float32.

    Raises:
        ValueError: for a missing array, lengths or shapes that disagree, no rows,
            values that are not finite, actions outside [-1, 1], episodes that are too
            short.

    Example:
        >>> x = np.zeros((3, 2))
        >>> data = make_dataset(
        ...     observations=x, actions=x, rewards=x[:, 0], next_observations=x,
        ...     terminals=[0, 1, 0], timeouts=[0, 0, 0],
        ... )
        >>> data.age.tolist(), data.truncated.tolist()
        ([0, 1, 0], [False, False, True])
    """
    given = {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "next_observations": next_observations,
        "terminals": terminals,
        "timeouts": timeouts,
    }
    arrays = _check_shapes(given, source)
    for key, array in arrays.items():
        _check_finite(key, array, source)
    _check_actions(arrays["actions"], source)
    terminated = arrays["terminals"].astype(bool)
    truncated = arrays["timeouts"].astype(bool) & ~terminated
    truncated[-1] |= not terminated[-1]
    age = _age(terminated | truncated)
    _check_lengths(age, min_length, source)
    return Dataset(
        observation=arrays["observations"],
        action=np.clip(arrays["actions"], -1.0, 1.0),
        reward=arrays["rewards"],
        next_observation=arrays["next_observations"],
        terminated=terminated,
        truncated=truncated,
        age=age,
    )


def _check_shapes(given: dict[str, Any], source: str) -> dict[str, np.ndarray]:
    absent = [key for key, value in given.items() if value is None]
    if absent:
        present = [key for key in given if key not in absent]
        raise ValueError(
            f"{source}: {', '.join(absent)} absent (present: "
            f"{', '.join(present) or 'none'}); all six are needed: without timeouts, "
            "for instance, windows of history would cross time limits. Add the missing "
            "arrays"
        )
    flags = ("terminals", "timeouts")
    arrays = {
        key: np.asarray(value, None if key in flags else np.float32)
        for key, value in given.items()
    }
    rows = len(arrays["observations"]) if arrays["observations"].ndim else 0
    for key, array in arrays.items():
        rank = 2 if key in ("observations", "actions", "next_observations") else 1
        if array.ndim != rank:
            raise ValueError(
                f"{source}: {key} has shape {array.shape}, expected {rank} axes "
                f"({'[rows, size]' if rank == 2 else '[rows]'}); reshape it"
            )
        if len(array) != rows:
            raise ValueError(
                f"{source}: {key} has {len(array)} rows, observations have {rows}; "
                "every array needs one row per step, so cut or re-record the longer one"
            )
    if rows == 0:
        raise ValueError(f"{source}: no rows; expected at least one step")
    shape, next_shape = arrays["observations"].shape, arrays["next_observations"].shape
    if shape != next_shape:
        raise ValueError(
            f"{source}: next_observations have shape {next_shape}, observations "
            f"{shape}; both must be of one size"
        )
    return arrays


def _check_finite(key: str, array: np.ndarray, source: str) -> None:
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"{source}: {key} holds {len(bad)} values that are NaN or infinite, the "
            f"first at [{', '.join(map(str, first))}] ({array[first]}); drop those "
            "episodes or record them again"
        )


def _check_actions(action: np.ndarray, source: str) -> None:
    bad = np.argwhere(np.abs(action) > 1.0 + ACTION_TOLERANCE)
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ValueError(
            f"{source}: {len(bad)} action values lie outside [-1, 1], the first at "
            f"[{row}, {column}] ({action[row, column]:.6g}; range of all "
            f"[{action.min():.6g}, {action.max():.6g}]); rescale the actions to [-1, 1]"
        )


def _age(ends: np.ndarray) -> np.ndarray:
    """Steps since the start of the episode, given the flags of its last rows."""
    index = np.arange(len(ends))
    starts = np.concatenate([[True], ends[:-1]])
    return (index - np.maximum.accumulate(np.where(starts, index, 0))).astype(np.int32)


def _check_lengths(age: np.ndarray, min_length: int, source: str) -> None:
    starts = np.flatnonzero(age == 0)
    lengths = np.diff(np.append(starts, len(age)))
    short = np.flatnonzero(lengths < min_length)
    if len(short):
        raise ValueError(
            f"{source}: {len(short)} of {len(lengths)} episodes are shorter than the "
            f"window of {min_length} steps (the shortest has {lengths.min()}, the "
            f"first starts at row {starts[short[0]]}); use a window of at most "
            f"{lengths.min()} or leave those out"
        )


def episode_bounds(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """First row and one past the last row of every episode: ``dataset[start:end]``.

    Example:
        >>> from emfuse_jax.data.synthetic import linear_gaussian
        >>> start, end = episode_bounds(linear_gaussian(3, 5)[0])
        >>> start.tolist(), end.tolist()
        ([0, 5, 10], [5, 10, 15])
    """
    age = np.asarray(dataset.age)
    starts = np.flatnonzero(age == 0)
    return starts, np.append(starts[1:], len(age))


def take(dataset: Dataset, rows: Any) -> Dataset:
    """The data set restricted to ``rows`` (a slice or an index of whole episodes).

    Example:
        >>> from emfuse_jax.data.synthetic import linear_gaussian
        >>> len(take(linear_gaussian(3, 5)[0], slice(5, 10)).reward)
        5
    """
    return jax.tree.map(lambda leaf: leaf[rows], dataset)


def split_episodes(
    dataset: Dataset, *, test: float = 0.1, validation: float = 0.05
) -> tuple[Dataset, Dataset, Dataset]:
    """Splits by whole episodes: the last ones test, those just before them validation.

    Split first and `concatenate` afterwards: the end of a concatenation is one source
    only.

    Args:
        dataset: at least three episodes.
        test: fraction of episodes, rounded, at least one.
        validation: fraction of episodes, rounded, at least one.

    Returns:
        Training, validation and test data.

    Raises:
        ValueError: if a fraction is not in (0, 1) or an episode of training does not
            remain.

    Example:
        >>> from emfuse_jax.data.synthetic import linear_gaussian
        >>> dataset, _ = linear_gaussian(10, 5)
        >>> [len(part.reward) for part in split_episodes(dataset, test=0.2)]
        [35, 5, 10]
    """
    if not (0 < test < 1 and 0 < validation < 1 and test + validation < 1):
        raise ValueError(
            f"test={test} and validation={validation} must be in (0, 1) and sum below 1"
        )
    starts, ends = episode_bounds(dataset)
    num_test = max(1, round(test * len(starts)))
    num_validation = max(1, round(validation * len(starts)))
    num_train = len(starts) - num_test - num_validation
    if num_train < 1:
        raise ValueError(
            f"{len(starts)} episodes cannot be split into training, {num_validation} "
            f"for validation and {num_test} for test; record at least three"
        )
    first_validation, first_test = (
        ends[num_train - 1],
        ends[num_train + num_validation - 1],
    )
    return (
        take(dataset, slice(None, first_validation)),
        take(dataset, slice(first_validation, first_test)),
        take(dataset, slice(first_test, None)),
    )


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """Data sets one after another; episodes stay whole.

    Raises:
        ValueError: if there is none, or observation or action sizes differ.

    Example:
        >>> from emfuse_jax.data.synthetic import linear_gaussian
        >>> first, second = (linear_gaussian(2, 5, seed=seed)[0] for seed in (0, 1))
        >>> len(concatenate([first, second]).reward)
        20
    """
    if not datasets:
        raise ValueError("concatenate got no data sets; expected at least one")
    sizes = [(d.observation.shape[1], d.action.shape[1]) for d in datasets]
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(
                f"data set {index} has observation and action sizes {size}, data set 0 "
                f"has {sizes[0]}; only data of one environment can be joined"
            )
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *datasets)


def gather_history(
    dataset: Dataset, index: Int[ArrayLike, "*batch"], num_lags: int
) -> History:
    """The steps at and before rows ``index``, newest first, never across an episode's
    start.

    Lag ``j`` is row ``index - j`` and valid iff the episode is that old; invalid lags
    repeat the episode's first row, so that values stay finite under a mask. Pure JAX:
    pass the data set's arrays as arguments of the jitted function, or they become its
    constants.

    Args:
        dataset: arrays of all rows.
        index: rows of the newest step.
        num_lags: static count.

    Returns:
        History with leaves ``[lag, *batch, …]``.

    Example:
        >>> from emfuse_jax.data.synthetic import linear_gaussian
        >>> dataset, _ = linear_gaussian(3, 5)
        >>> history = gather_history(dataset, np.array([6]), 3)  # row 5 began its episode
        >>> history.valid[:, 0].tolist()
        [True, True, False]
    """
    index = jnp.asarray(index)
    age = jnp.asarray(dataset.age)[index][None]
    lag = jnp.arange(num_lags, dtype=age.dtype).reshape((num_lags,) + (1,) * index.ndim)
    rows = index[None] - jnp.minimum(lag, age)
    return History(
        observation=jnp.asarray(dataset.observation)[rows],
        action=jnp.asarray(dataset.action)[rows],
        valid=lag <= age,
    )


def gather_transition(dataset: Dataset, index: Int[ArrayLike, "*batch"]) -> Transition:
    """Rows ``index`` as transitions ``[*batch, …]``.

    Example:
        >>> from emfuse_jax.data.synthetic import linear_gaussian
        >>> row = gather_transition(linear_gaussian(3, 5)[0], np.array([4, 5]))
        >>> row.truncated.tolist()
        [True, False]
    """
    return Transition(
        *(jnp.asarray(getattr(dataset, name))[index] for name in Transition._fields)
    )
