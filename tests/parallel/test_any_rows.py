"""Any number of rows, devices, blocks, axes and shapes: what is placed is what it was."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from emfuse_jax.parallel import ROW_KEY, make_mesh, shard_rows, split
from emfuse_jax.parallel._rows import cut_rows, pad_rows


def drawn(params, key, tree):
    """Numbers of each row's own key beside what it was given."""
    (rows,) = tree
    return {"noise": jax.random.normal(key, rows.shape), "scaled": params * rows}


@hypothesis.settings(max_examples=6)  # each is compiled
@hypothesis.given(
    num_rows=st.integers(1, 19),
    devices=st.sampled_from([1, 2, 8]),
    block_size=st.none() | st.integers(1, 5),
    row_axis=st.integers(0, 1),
)
def test_rows_are_what_each_would_be_alone(num_rows, devices, block_size, row_axis):
    shape = (2,) * row_axis + (num_rows, 2)
    rows = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    run = shard_rows(
        drawn,
        make_mesh({"data": devices}),
        in_axes=(None, ROW_KEY, row_axis),
        out_axes=row_axis,
        block_size=block_size,
    )
    found = jax.jit(run)(3.0, jax.random.key(0), (rows,))
    assert found["noise"].shape == found["scaled"].shape == shape
    np.testing.assert_array_equal(found["scaled"], 3 * rows)
    last = num_rows - 1  # the one beside which the padding lies
    one = np.take(rows, [last], row_axis)
    key = jax.random.fold_in(jax.random.key(0), last)
    expected = jax.random.normal(key, one.shape)
    np.testing.assert_array_equal(np.take(found["noise"], [last], row_axis), expected)
    assert len(np.unique(found["noise"])) == rows.size


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 2))
def test_padding_is_cut_off_again(num_rows, more, axis):
    shape = [2, 2, 2]
    shape[axis] = num_rows
    leaf = jnp.arange(np.prod(shape)).reshape(shape)
    padded = pad_rows(leaf, axis, num_rows + more)
    assert padded.shape[axis] == num_rows + more
    np.testing.assert_array_equal(cut_rows(padded, axis, num_rows), leaf)
    end = np.take(padded, range(num_rows, num_rows + more), axis)
    last = np.take(leaf, [-1] * more, axis)
    np.testing.assert_array_equal(end, last)


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.integers(0, 20), st.sampled_from([1, 3, 8]))
def test_rows_are_shared_evenly_or_refused(num_rows, devices):
    mesh, rows = make_mesh({"data": devices}), np.arange(num_rows)
    if num_rows % devices:
        with pytest.raises(ValueError, match=f"{num_rows} .*{devices} devices"):
            split(rows, mesh)
        return
    shards = split(rows, mesh).addressable_shards
    assert {shard.data.shape for shard in shards} == {(num_rows // devices,)}
    np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), rows)
