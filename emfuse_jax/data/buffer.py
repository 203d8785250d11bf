"""A ring buffer of model transitions, some rows of which may be refused.

State, storage and sampling are flashbax's item buffer. Only its ``add`` does not fit:
it stores every row, but a model rollout ends at different steps in different rows and
nothing after an end may ever be drawn.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from emfuse_jax.base import Buffer, State


def ring_buffer(capacity: int, batch_size: int) -> Buffer:
    """A first-in first-out store of rows with uniform sampling (with replacement).

    ``init(example)`` takes one row. ``add(state, batch, *, valid=None)`` appends the
    rows of ``batch [rows, …]`` in order, or those with ``valid [rows]`` true, over the
    oldest. ``sample(key, state)`` draws ``batch_size`` rows; from an empty buffer it
    returns meaningless rows (see `num_stored`).

    To keep the rollouts of the last ``n`` refreshes, give it the capacity of ``n``
    adds.

    Args:
        capacity: rows kept.
        batch_size: rows per sample.

    Raises:
        ValueError: if a size is not positive; from ``add``, at trace time, if a batch
            has more rows than the buffer or another structure.

    Example:
        >>> buffer = ring_buffer(capacity=4, batch_size=2)
        >>> state = buffer.init(jnp.float32(0))
        >>> rows = jnp.arange(3.0)
        >>> state = buffer.add(state, rows, valid=jnp.array([True, False, True]))
        >>> int(num_stored(state))
        2
    """
    if capacity < 1 or batch_size < 1:
        raise ValueError(
            f"capacity={capacity} and batch_size={batch_size} must be at least 1"
        )
    import flashbax

    item_buffer = flashbax.make_item_buffer(
        max_length=max(capacity, batch_size),
        min_length=1,
        sample_batch_size=batch_size,
        add_batches=True,
    )

    def init(example: Any) -> State:
        state = item_buffer.init(jax.tree.map(jnp.asarray, example))
        # flashbax wants room for a whole sample; ours may be larger than the buffer.
        experience = jax.tree.map(lambda x: x[:, :capacity], state.experience)
        # flashbax's index is weakly typed: the first update would compile twice.
        index = jnp.zeros((), jnp.int32)
        return state.replace(experience=experience, current_index=index)

    def add(
        state: State, batch: Any, *, valid: Bool[Array, "rows"] | None = None
    ) -> State:
        rows = _check_batch(state, batch, capacity)
        valid = jnp.ones(rows, bool) if valid is None else valid
        offset = jnp.cumsum(valid, dtype=jnp.int32)
        # Refused rows go out of bounds, where a scatter drops them.
        index = jnp.where(
            valid, (state.current_index + offset - 1) % capacity, capacity
        )
        experience = jax.tree.map(
            lambda stored, new: stored.at[0, index].set(new, mode="drop"),
            state.experience,
            batch,
        )
        end = state.current_index + offset[-1]
        return state.replace(
            experience=experience,
            current_index=end % capacity,
            is_full=state.is_full | (end >= capacity),
        )

    def sample(key: jax.Array, state: State) -> Any:
        # flashbax adds a row of offsets to a column of starts.
        with jax.numpy_rank_promotion("allow"):
            return item_buffer.sample(state, key).experience

    return Buffer(init, add, sample)


def num_stored(state: State) -> Int[Array, ""]:
    """How many rows a buffer holds.

    Example:
        >>> buffer = ring_buffer(capacity=3, batch_size=2)
        >>> state = buffer.add(buffer.init(jnp.float32(0)), jnp.arange(2.0))
        >>> int(num_stored(state))
        2
    """
    capacity = jax.tree.leaves(state.experience)[0].shape[1]
    return jnp.where(state.is_full, capacity, state.current_index)


def _check_batch(state: State, batch: Any, capacity: int) -> int:
    expected = jax.tree.map(lambda x: (x.shape[2:], x.dtype), state.experience)
    given = jax.tree.map(lambda x: (x.shape[1:], x.dtype), batch)
    if jax.tree.structure(batch) != jax.tree.structure(state.experience) or (
        given != expected
    ):
        raise ValueError(f"rows of {given} do not fit a buffer of {expected}")
    counts = {x.shape[0] for x in jax.tree.leaves(batch)}
    if len(counts) != 1:
        raise ValueError(f"the batch's leaves have {sorted(counts)} rows; expected one")
    rows = counts.pop()
    if rows == 0 or rows > capacity:
        raise ValueError(
            f"{rows} rows in one add to a buffer of {capacity}; add between 1 and "
            f"{capacity}, or raise the capacity"
        )
    return rows
