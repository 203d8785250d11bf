"""The slice encoder: what a mask hides is without effect, order and length are not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.nets.encoder import slice_encoder

LAGS, OBS, ACT, ROWS = 4, 3, 2, 6


@pytest.fixture(scope="module")
def network():
    return slice_encoder(8, 8, 2)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(1), 2)
    anchor = jax.random.normal(keys[0], (ROWS, OBS))
    return anchor, jax.random.normal(keys[1], (ROWS, LAGS, ACT))


@pytest.fixture(scope="module")
def params(network, inputs):
    return jax.jit(network.init)(jax.random.key(0), *inputs, first(LAGS))


@pytest.fixture(scope="module")
def encode(network, params):
    return jax.jit(lambda *args: network.apply(params, *args))


def first(length):
    """The mask of a slice of this length, for every row."""
    return jnp.broadcast_to(jnp.arange(LAGS)[None] < length, (ROWS, LAGS))


@pytest.mark.parametrize("length", range(1, LAGS))
def test_actions_before_the_slice_leave_the_feature_bit_identical(
    encode, inputs, length
):
    anchor, action = inputs
    feature = encode(anchor, action, first(length))
    for other in (0.0, -7.0, 1e6):
        changed = action.at[:, length:].set(other)
        np.testing.assert_array_equal(encode(anchor, changed, first(length)), feature)
    # An action inside the slice matters, whichever it is.
    for lag in range(length):
        changed = encode(anchor, action.at[:, lag].add(0.5), first(length))
        assert np.abs(changed - feature).max(axis=1).min() > 1e-3


def test_order_and_length_matter(encode, inputs):
    anchor, action = inputs
    feature = encode(anchor, action, first(3))
    swapped = encode(anchor, action[:, jnp.array([0, 2, 1, 3])], first(3))
    assert np.abs(swapped - feature).max(axis=1).min() > 1e-3
    same = jnp.broadcast_to(action[:, :1], action.shape)
    lengths = [encode(anchor, same, first(length)) for length in range(1, LAGS + 1)]
    for shorter, longer in itertools.pairwise(lengths):
        assert np.abs(shorter - longer).max(axis=1).min() > 1e-3


def test_rows_and_batch_axes_are_independent(encode, network, params, inputs):
    anchor, action = inputs
    feature = encode(anchor, action, first(2))
    assert feature.shape == (ROWS, 8 + 8)
    moved = encode(anchor.at[0].add(1.0), action.at[1].add(1.0), first(2))
    np.testing.assert_array_equal(moved[2:], feature[2:])
    assert (moved[:2] != feature[:2]).any(axis=1).all()
    # Two batch axes.
    grid = [leaf.reshape(2, 3, *leaf.shape[1:]) for leaf in (anchor, action, first(2))]
    np.testing.assert_allclose(
        network.apply(params, *grid), feature.reshape(2, 3, -1), rtol=1e-5, atol=1e-6
    )


def test_zeros_and_one_lag_make_no_nan(encode, network):
    zeros = encode(jnp.zeros((ROWS, OBS)), jnp.zeros((ROWS, LAGS, ACT)), first(1))
    assert np.isfinite(zeros).all()
    one = jnp.zeros((1, OBS)), jnp.zeros((1, 1, ACT)), jnp.ones((1, 1), bool)
    shapes = jax.eval_shape(
        lambda: network.apply(network.init(jax.random.key(0), *one), *one)
    )
    assert shapes.shape == (1, 16)
