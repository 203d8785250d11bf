"""The cache's bookkeeping, beside a list that grows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.llm.cache import (
    EXPERT_AXES,
    KvCache,
    check_room,
    init_cache,
    mark_columns,
    write_columns,
)


def test_columns_are_written_one_after_another():
    generator = np.random.default_rng(0)
    cache = init_cache(1, (2, 3, 10, 4))
    columns, flags = [], []
    for time in (4, 1, 2):
        new = jnp.asarray(generator.normal(size=(2, 3, time, 4)), jnp.float32)
        valid = jnp.asarray(generator.integers(0, 2, (2, time)), bool)
        keys = write_columns(cache.keys[0], new, cache.column)
        cache = mark_columns(cache._replace(keys=(keys,)), valid)
        columns.append(new)
        flags.append(valid)
    written, valid = jnp.concatenate(columns, 2), jnp.concatenate(flags, 1)
    np.testing.assert_array_equal(cache.keys[0][:, :, :7], written)
    assert not cache.keys[0][:, :, 7:].any()
    np.testing.assert_array_equal(cache.valid[:, :7], valid)
    assert not cache.valid[:, 7:].any()
    np.testing.assert_array_equal(cache.num_tokens, valid.sum(1))
    assert int(cache.column) == 7
    assert not cache.values[0].any()


def test_experts_share_the_bookkeeping():
    cache = jax.vmap(
        lambda: init_cache(2, (1, 2, 5, 4), jnp.bfloat16),
        in_axes=(),
        out_axes=EXPERT_AXES,
        axis_size=3,
    )()
    assert isinstance(cache, KvCache)
    assert {x.shape for x in (*cache.keys, *cache.values)} == {(3, 1, 2, 5, 4)}
    assert cache.keys[0].dtype == jnp.bfloat16
    assert (cache.valid.shape, cache.num_tokens.shape, cache.column.shape) == (
        (1, 5),
        (1,),
        (),
    )


def test_what_cannot_fit_is_refused():
    cache = init_cache(1, (1, 1, 5, 2))
    check_room(cache, 5)
    for count in (0, 6):
        with pytest.raises(
            ValueError, match=f"{count} columns for a cache of length 5"
        ):
            check_room(cache, count)
    with pytest.raises(ValueError, match="sizes of at least 1"):
        init_cache(1, (0, 1, 5, 2))
