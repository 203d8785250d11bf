"""The cache of keys and values that decoding reads and writes.

Columns are filled from left to right, the same column for every row of a batch: rows of
unequal length are padded, and padded columns are marked invalid for ever. Arrays have a
fixed size, so that a whole generation is one scan, and each step writes one column in
place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KvCache(NamedTuple):
    """What the columns read so far have left behind.

    Attributes:
        keys: of each layer, ``[batch, kv_head, length, head_dim]``, already rotated.
        values: of each layer, of the same shape.
        valid: which columns hold a token, ``[batch, length]``.
        num_tokens: valid tokens so far, ``[batch]``: the position of the next one.
        column: the next column to write, ``[]``.
    """

    keys: tuple[Float[Array, "batch kv_head length head_dim"], ...]
    values: tuple[Float[Array, "batch kv_head length head_dim"], ...]
    valid: Bool[Array, "batch length"]
    num_tokens: Int[Array, "batch"]
    column: Int[Array, ""]


# Typed loosely: jax takes a tree of axes wherever it takes one axis.
EXPERT_AXES = KvCache(keys=0, values=0, valid=None, num_tokens=None, column=None)  # pyright: ignore[reportArgumentType]
"""``in_axes`` and ``out_axes`` of a cache whose experts read the same tokens.

Keys and values are stacked; the bookkeeping is one for all. With a stacked ``column`` each
write would become a scatter, which costs more than the attention it feeds.
"""


def init_cache(
    num_layers: int,
    shape: tuple[int, int, int, int],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> KvCache:
    """An empty cache.

    Args:
        num_layers: of the model.
        shape: ``(batch, kv_head, length, head_dim)``.
        dtype: of keys and values.

    Example:
        >>> cache = init_cache(2, (1, 4, 16, 8))
        >>> len(cache.keys), cache.keys[0].shape, int(cache.column)
        (2, (1, 4, 16, 8), 0)
    """
    if min(num_layers, *shape) < 1:
        raise ValueError(
            f"a cache of {num_layers} layers of shape (batch, kv_head, length, head_dim) "
            f"= {shape}; expected sizes of at least 1"
        )
    batch, _, length, _ = shape
    return KvCache(
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        jnp.zeros((batch, length), bool),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def write_columns(
    old: Float[Array, "batch kv_head length head_dim"],
    new: Float[Array, "batch kv_head time head_dim"],
    column: Int[Array, ""],
) -> Float[Array, "batch kv_head length head_dim"]:
    """``old`` with ``new`` from ``column`` on.

    Example:
        >>> keys = jnp.zeros((1, 1, 4, 1))
        >>> keys = write_columns(keys, jnp.ones((1, 1, 2, 1)), jnp.array(1))
        >>> keys[0, 0, :, 0].tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    zero = jnp.zeros_like(column)
    start = (zero, zero, column, zero)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)


def mark_columns(cache: KvCache, valid: Bool[Array, "batch time"]) -> KvCache:
    """The bookkeeping after ``time`` more columns; keys and values are left alone.

    Example:
        >>> cache = init_cache(1, (2, 1, 4, 8))
        >>> cache = mark_columns(cache, jnp.array([[False, True], [True, True]]))
        >>> cache.num_tokens.tolist(), int(cache.column)  # rows are padded, columns shared
        ([1, 2], 2)
    """
    start = (jnp.zeros_like(cache.column), cache.column)
    return cache._replace(
        valid=jax.lax.dynamic_update_slice(cache.valid, valid, start),
        num_tokens=cache.num_tokens + jnp.sum(valid, axis=1, dtype=jnp.int32),
        column=cache.column + valid.shape[1],
    )


def check_room(cache: KvCache, num_columns: int) -> None:
    """Refuses what no position in the cache could make room for.

    How many columns are taken is known only when the program runs: whoever makes the cache
    must make it long enough for the prompt, padding included, and all that follows.

    Raises:
        ValueError: if there are more columns than the cache is long.

    Example:
        >>> cache = init_cache(1, (1, 1, 16, 8))
        >>> check_room(cache, 16)
        >>> check_room(cache, 17)
        Traceback (most recent call last):
            ...
        ValueError: 17 columns for a cache of length 16; expected 1 to 16: make the cache with ...
    """
    length = cache.valid.shape[1]
    if not 1 <= num_columns <= length:
        raise ValueError(
            f"{num_columns} columns for a cache of length {length}; expected 1 to {length}: "
            "make the cache with init_cache(batch_size, length) as long as the prompt and "
            "the tokens to generate"
        )
