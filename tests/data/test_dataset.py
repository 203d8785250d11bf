import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emfuse_jax.data.dataset import (
    concatenate,
    episode_bounds,
    gather_history,
    gather_transition,
    make_dataset,
    split_episodes,
)


def arrays(lengths, endings=None, seed=0):
    """Episodes whose observations say (episode, step), so that a mix-up is visible."""
    endings = endings or ["terminal"] * len(lengths)
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(n) for n in lengths])
    ends = np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros(rows, bool), np.zeros(rows, bool)
    for end, ending in zip(ends, endings, strict=True):
        (terminals if ending == "terminal" else timeouts)[end] = ending != "cut"
    return {
        "observations": np.stack([episode, step], axis=1).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 3)).astype(np.float32),
        "rewards": rng.standard_normal(rows).astype(np.float32),
        "next_observations": np.stack([episode, step + 1], axis=1).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def test_ends_ages_and_bounds():
    data = make_dataset(**arrays([3, 1, 4], ["terminal", "timeout", "cut"]))
    assert data.age.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert np.flatnonzero(data.terminated).tolist() == [2]
    # The file ends inside an episode: the last row counts as truncated.
    assert np.flatnonzero(data.truncated).tolist() == [3, 7]
    starts, ends = episode_bounds(data)
    assert starts.tolist() == [0, 3, 4]
    assert ends.tolist() == [3, 4, 8]


def test_a_step_both_terminal_and_timed_out_is_terminal():
    given_arrays = arrays([3, 2])
    given_arrays["timeouts"][2] = True
    data = make_dataset(**given_arrays)
    assert data.terminated[2]
    assert not data.truncated[2]


def test_dtypes_and_rounding():
    given_arrays = {k: v.astype(np.float64) for k, v in arrays([3, 2]).items()}
    given_arrays["actions"][0, 0] = 1.0 + 5e-7
    data = make_dataset(**given_arrays)
    assert (
        data.observation.dtype == data.action.dtype == data.reward.dtype == np.float32
    )
    assert data.terminated.dtype == bool
    assert data.age.dtype == np.int32
    assert np.abs(data.action).max() <= 1.0


def corrupt(key, value):
    def change(given_arrays):
        given_arrays[key] = value(given_arrays[key])

    return change


def put(index, value):
    def change(array):
        array = array.copy()
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (corrupt("timeouts", lambda x: None), "timeouts absent"),
        (
            corrupt("rewards", lambda x: x[:-1]),
            "rewards has 6 rows, observations have 7",
        ),
        (
            corrupt("rewards", lambda x: x[:, None]),
            r"rewards has shape \(7, 1\), expected 1",
        ),
        (
            corrupt("observations", put((4, 1), np.nan)),
            r"observations holds 1 .* \[4, 1\]",
        ),
        (corrupt("rewards", put([2, 5], np.inf)), r"rewards holds 2 values .* \[2\]"),
        (
            corrupt("next_observations", put((0, 0), -np.inf)),
            "next_observations holds 1",
        ),
        (
            corrupt("actions", put((3, 2), 1.001)),
            r"1 action values .* \[3, 2\] \(1.001",
        ),
        (corrupt("next_observations", lambda x: x[:, :1]), "both must be of one size"),
    ],
)
def test_bad_arrays_are_refused(change, message):
    given_arrays = arrays([3, 4])
    make_dataset(**given_arrays)
    change(given_arrays)
    with pytest.raises(ValueError, match=message) as error:
        make_dataset(**given_arrays, source="broken.hdf5")
    assert str(error.value).startswith("broken.hdf5: ")


def test_no_rows_and_episodes_shorter_than_the_window_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        make_dataset(**{k: v[:0] for k, v in arrays([1]).items()})
    given_arrays = arrays([6, 3, 5])
    make_dataset(**given_arrays, min_length=3)
    with pytest.raises(ValueError, match=r"1 of 3 .* window of 4 .* starts at row 6"):
        make_dataset(**given_arrays, min_length=4)


def test_split_takes_the_last_episodes_whole():
    lengths = list(np.random.default_rng(0).integers(2, 9, 40))
    data = make_dataset(**arrays([int(n) for n in lengths]))
    train, validation, test = split_episodes(data)
    episodes = [
        np.unique(part.observation[:, 0]).tolist() for part in (train, validation, test)
    ]
    assert episodes == [list(range(34)), [34, 35], [36, 37, 38, 39]]
    for part in (train, validation, test):
        assert part.age[0] == 0
        assert (part.terminated | part.truncated)[-1]
    small = make_dataset(**arrays([2, 2, 2]))
    assert [len(part.reward) for part in split_episodes(small)] == [2, 2, 2]
    with pytest.raises(ValueError, match="at least three"):
        split_episodes(make_dataset(**arrays([5, 5])))
    with pytest.raises(ValueError, match="test=1"):
        split_episodes(data, test=1.0)


def test_concatenate_keeps_episodes_and_refuses_other_sizes():
    first, second = make_dataset(**arrays([3, 2])), make_dataset(**arrays([4]))
    both = concatenate([first, second])
    assert episode_bounds(both)[0].tolist() == [0, 3, 5]
    other = second._replace(action=second.action[:, :2])
    with pytest.raises(ValueError, match=r"data set 1 .*\(2, 2\).*\(2, 3\)"):
        concatenate([first, other])
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])


gather = jax.jit(gather_history, static_argnums=2)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    endings=st.lists(st.sampled_from(["terminal", "timeout"]), min_size=6, max_size=6),
    num_lags=st.sampled_from([1, 4]),
)
def test_windows_never_cross_an_episode(lengths, endings, num_lags):
    raw = arrays(lengths, endings[: len(lengths)])
    # One shape for the compiler: pad with a last episode.
    padding = 48 - sum(lengths)
    raw = arrays([*lengths, padding], [*endings[: len(lengths)], "timeout"])
    data = make_dataset(**raw)
    index = np.arange(48)
    history = jax.device_get(gather(data, index, num_lags))
    assert history.observation.shape == (num_lags, 48, 2)
    # Every lag, valid or not, lies in the newest row's episode …
    assert (history.observation[..., 0] == history.observation[:1, :, 0]).all()
    for row in index:
        steps, valid = history.observation[:, row, 1], history.valid[:, row]
        age = int(data.age[row])
        # … the valid ones count backwards, and there are as many as the episode is old.
        assert valid.tolist() == [lag <= age for lag in range(num_lags)]
        assert steps[valid].tolist() == [age - lag for lag in range(valid.sum())]
        # No window starts after a terminal step: its newest step is one that was taken.
        assert (
            steps[0]
            < dict(enumerate([*lengths, padding]))[history.observation[0, row, 0]]
        )
    assert np.isfinite(history.action).all()
    # A gather that ignores ages would have mixed episodes.
    if num_lags > 1 and len(lengths) > 0:
        naive = data.observation[np.maximum(index - 1, 0), 0]
        assert (naive != data.observation[:, 0]).any()


def test_history_matches_under_vmap_and_for_batched_indices():
    data = jax.tree.map(jnp.asarray, make_dataset(**arrays([5, 6, 3])))
    index = jnp.array([[0, 4], [7, 13]])
    whole = gather(data, index, 3)
    one = jax.vmap(jax.vmap(lambda i: gather_history(data, i, 3)))(index)
    moved = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 2, 0), one)
    for left, right in zip(jax.tree.leaves(whole), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(left, right)


def test_transitions_are_the_rows():
    data = make_dataset(**arrays([5, 6]))
    batch = jax.jit(gather_transition)(data, jnp.array([4, 0]))
    np.testing.assert_array_equal(batch.action, data.action[[4, 0]])
    assert batch.terminated.tolist() == [True, False]
