"""Windows, slices and coordinates: nothing crosses an episode, every lag its scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from _standard_errors import assert_mean_close
from emfuse_jax.base import History
from emfuse_jax.data.dataset import make_dataset
from emfuse_jax.dynamics import Batch, fit_scales, make_slices, sample_windows
from emfuse_jax.dynamics.base import newest_lags, pick_slice
from emfuse_jax.dynamics.contrastive import training_rows

ROWS, LAGS = 24, 4
AFTER_THE_END = -1e6


def numbered(ends, terminal=None):
    """Observations ``1000 · episode + age``; what follows an end is seen nowhere else."""
    ends = np.array(ends)
    ends[-1] = True
    episode = np.cumsum(np.concatenate([[0], ends[:-1]]))
    age = np.concatenate([np.arange(n) for n in np.bincount(episode)])
    observation = (1000.0 * episode + age)[:, None]
    terminal = ends if terminal is None else terminal & ends
    following = np.where(terminal[:, None], AFTER_THE_END, observation + 1)
    return make_dataset(
        observations=observation,
        actions=np.zeros((len(ends), 1)),
        rewards=age,
        next_observations=following,
        terminals=terminal,
        timeouts=ends & ~terminal,
    )


@jax.jit
def draw(key, dataset):
    key_window, key_slice = jax.random.split(key)
    batch = sample_windows(key_window, dataset, 64, LAGS)
    return batch, training_rows(key_slice, batch, "backtrack", 0.3)


@settings(max_examples=25, deadline=None)
@given(
    ends=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
    seed=st.integers(0, 1000),
)
def test_windows_and_slices_never_cross_an_episode(ends, seed):
    dataset = numbered(ends, terminal=np.zeros(ROWS, bool))
    batch, rows = draw(jax.random.key(seed), jax.tree.map(jnp.asarray, dataset))
    state, valid = np.asarray(batch.history.observation[..., 0]), batch.history.valid
    lag = np.arange(LAGS)[:, None]
    # Valid lags count down from the newest state and stop at the episode's start.
    np.testing.assert_array_equal(valid, lag <= state[:1] % 1000)
    np.testing.assert_array_equal(state[valid], (state[:1] - lag)[valid])
    # A slice of m actions starts m - 1 steps back: m steps lead to the next state.
    length = np.asarray(rows.lags).sum(1)
    assert (rows.anchor[:, 0] // 1000 == state[0] // 1000).all()
    np.testing.assert_array_equal(rows.anchor[:, 0], state[0] - (length - 1))
    np.testing.assert_array_equal(rows.target, np.stack([length, state[0] % 1000], 1))


def test_no_window_starts_after_an_end():
    dataset = numbered(np.arange(ROWS) % 5 == 4)
    assert (dataset.next_observation == AFTER_THE_END).sum() == 5
    batch, _ = draw(jax.random.key(0), jax.tree.map(jnp.asarray, dataset))
    assert (batch.history.observation > AFTER_THE_END).all()
    assert (batch.next_observation == AFTER_THE_END).any()  # a target, never a start


def full_batch(valid_lags, rows):
    state = jnp.arange(1.0, LAGS + 1)[:, None, None]
    return Batch(
        History(
            jnp.broadcast_to(-state, (LAGS, rows, 2)),
            jnp.broadcast_to(state, (LAGS, rows, 1)),
            jnp.broadcast_to(jnp.arange(LAGS)[:, None] < valid_lags, (LAGS, rows)),
        ),
        jnp.full((rows,), 7.0),
        jnp.zeros((rows, 2)),
    )


@pytest.mark.parametrize("valid", [1, 2, LAGS])
def test_every_row_draws_a_slice_of_its_own(valid):
    rows = training_rows(jax.random.key(0), full_batch(valid, 4000), "backtrack", 0.4)
    length = np.asarray(rows.lags).sum(1)
    share = np.array([0.4] + [0.2] * (valid - 1))
    # A draw for the whole batch would give one length.
    assert set(length) == set(range(1, valid + 1))
    indicator = length[:, None] == np.arange(1, valid + 1)[None]
    assert_mean_close(indicator, share / share.sum(), std=0.5)
    np.testing.assert_array_equal(rows.anchor[:, 0], -length)
    np.testing.assert_array_equal(rows.target[:, -1], 7.0)


def test_the_newest_slice_alone():
    rows = training_rows(jax.random.key(0), full_batch(LAGS, 100), "backtrack", 1.0)
    np.testing.assert_array_equal(np.asarray(rows.lags).sum(1), 1)


def test_slices_of_a_history():
    history = full_batch(3, 5).history
    slices = make_slices(history, "backtrack")
    assert slices.action.shape == (5, LAGS, 1)
    np.testing.assert_array_equal(slices.action[0, :, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(slices.anchor[:, 0, 0], [-1, -2, -3, -4])
    np.testing.assert_array_equal(slices.lags[:, 0], np.tri(LAGS, dtype=bool))
    np.testing.assert_array_equal(slices.valid[:, 0], [True, True, True, False])
    current = make_slices(history, "current")
    np.testing.assert_array_equal(current.anchor[:, 0, 0], [-1, -1, -1, -1])
    np.testing.assert_array_equal(current.lags, slices.lags)


def test_pick_slice_takes_one_per_row():
    leaf = jnp.arange(24.0).reshape(3, 4, 2)
    index = jnp.array([0, 2, 1, 1])
    picked, flat = pick_slice((leaf, leaf[..., 0]), index)
    expected = np.asarray(leaf)[index, np.arange(4)]
    np.testing.assert_array_equal(picked, expected)
    np.testing.assert_array_equal(flat, expected[:, 0])


def test_the_newest_lags_of_a_longer_history():
    history = full_batch(3, 5).history
    shorter = newest_lags(history, 2)
    np.testing.assert_array_equal(shorter.observation, history.observation[:2])
    assert shorter.valid.shape == (2, 5)
    with pytest.raises(
        ValueError, match="history has 4 lags, the model reads num_lags=5"
    ):
        newest_lags(history, 5)


@pytest.mark.parametrize("kind", ["standard", "box"])
@pytest.mark.parametrize("anchor", ["backtrack", "current"])
def test_scales_are_those_of_each_lag(kind, anchor):
    generator = np.random.default_rng(0)
    ends = np.arange(ROWS) % 8 == 7
    state = generator.standard_normal((ROWS, 2)) + 500.0 * (
        np.arange(ROWS)[:, None] // 8
    )
    dataset = make_dataset(
        observations=state,
        actions=generator.uniform(-1, 1, (ROWS, 1)),
        rewards=generator.standard_normal(ROWS),
        next_observations=state + 1.0,
        terminals=np.zeros(ROWS, bool),
        timeouts=ends,
    )
    scales = fit_scales(dataset, 3, anchor=anchor, target=kind)
    assert scales.target.scale.shape == (3, 3)
    for lag in range(3):
        rows = [r for r in range(ROWS) if r % 8 >= lag]
        starts = [r - lag if anchor == "backtrack" else r for r in rows]
        change = np.column_stack(
            [
                dataset.next_observation[rows] - dataset.observation[starts],
                dataset.reward[rows],
            ]
        )
        if kind == "box":
            mean, scale = np.zeros(3), np.abs(change).max(0)
        else:
            mean, scale = change.mean(0), change.std(0)
            scale[:2] = np.where(change[:, :2].std(0) < 1e-3, 1.0, scale[:2])
        np.testing.assert_allclose(scales.target.mean[lag], mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(scales.target.scale[lag], scale, rtol=1e-3)
    # A window across two episodes would have seen a jump of 500.
    assert float(scales.target.scale.max()) < 20.0
    np.testing.assert_allclose(scales.action.mean, dataset.action.mean(0), atol=1e-6)


def test_a_window_longer_than_every_episode_is_refused():
    dataset = numbered(np.arange(ROWS) % 3 == 2)
    with pytest.raises(ValueError, match="the longest episode has 3 steps"):
        fit_scales(dataset, 4)
    assert fit_scales(dataset, 3).target.scale.shape == (3, 2)
