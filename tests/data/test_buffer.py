import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emfuse_jax.data.buffer import num_stored, ring_buffer

CAPACITY = 7
BUFFER = ring_buffer(CAPACITY, 64)
add = jax.jit(lambda state, batch, valid: BUFFER.add(state, batch, valid=valid))
sample = jax.jit(BUFFER.sample)


def row(value):
    return {
        "x": jnp.array([value, -value], jnp.float32),
        "flag": jnp.array(value % 2 == 0),
    }


def rows(values):
    values = np.asarray(values)
    return {
        "x": np.stack([values, -values], axis=1).astype(np.float32),
        "flag": values % 2 == 0,
    }


def contents(state):
    """Oldest first."""
    count, head = int(num_stored(state)), int(state.current_index)
    order = (
        (head + np.arange(CAPACITY)) % CAPACITY
        if count == CAPACITY
        else np.arange(count)
    )
    return np.asarray(state.experience["x"])[0, order, 0].tolist()


@settings(max_examples=60, deadline=None)
@given(
    adds=st.lists(
        st.sampled_from([1, 3, 4, 7]).flatmap(
            lambda n: st.lists(st.booleans(), min_size=n, max_size=n)
        ),
        max_size=8,
    )
)
def test_any_sequence_of_adds_equals_a_deque(adds):
    state, deque, value = BUFFER.init(row(0)), collections.deque(maxlen=CAPACITY), 1
    for valid in adds:
        values = np.arange(value, value + len(valid))
        value += len(valid)
        state = add(state, rows(values), jnp.array(valid))
        deque.extend(v for v, keep in zip(values, valid, strict=True) if keep)
        assert contents(state) == list(deque)
    if deque:
        batch = sample(jax.random.key(0), state)
        # Only stored rows are drawn, and all leaves of a row belong together.
        assert set(np.asarray(batch["x"])[:, 0]) <= set(map(float, deque))
        np.testing.assert_array_equal(batch["x"][:, 0], -batch["x"][:, 1])
        np.testing.assert_array_equal(batch["flag"], batch["x"][:, 0] % 2 == 0)


def test_every_row_is_reached_and_the_oldest_is_evicted():
    state = BUFFER.init(row(0))
    for value in range(1, CAPACITY + 1):
        state = BUFFER.add(state, rows([value]))
    assert int(num_stored(state)) == CAPACITY
    drawn = np.asarray(sample(jax.random.key(1), state)["x"])[:, 0]
    # Missing one of 7 rows in 64 draws has probability below 7 (6/7)^64 = 4e-4.
    assert set(drawn) == set(range(1, CAPACITY + 1))
    state = BUFFER.add(state, rows([100]))
    drawn = np.asarray(sample(jax.random.key(1), state)["x"])[:, 0]
    assert 1 not in drawn
    assert 100 in drawn


def test_scan_and_vmap_equal_a_loop():
    values = jnp.arange(24.0).reshape(2, 4, 3)
    valid = values % 5 != 0
    buffer = ring_buffer(5, 4)
    empty = buffer.init(jnp.float32(0))

    def run(values, valid):
        def step(state, args):
            return buffer.add(state, args[0], valid=args[1]), None

        return jax.lax.scan(step, empty, (values, valid))[0]

    batched = jax.jit(jax.vmap(run))(values, valid)
    for seed in range(2):
        state = empty
        for step in range(4):
            state = buffer.add(state, values[seed, step], valid=valid[seed, step])
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a[seed], b),  # noqa: B023
            batched,
            state,
        )


def test_state_is_stable_under_add():
    state = BUFFER.init(row(0))
    after = jax.eval_shape(BUFFER.add, state, rows([1, 2]))
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), after
    )


def test_bad_input_is_refused_before_tracing():
    state = BUFFER.init(row(0))
    with pytest.raises(ValueError, match="8 rows in one add to a buffer of 7"):
        jax.eval_shape(BUFFER.add, state, rows(np.arange(8)))
    with pytest.raises(ValueError, match="do not fit"):
        BUFFER.add(state, rows([1])["x"])
    with pytest.raises(ValueError, match="do not fit"):
        BUFFER.add(state, {**rows([1]), "flag": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="capacity=0"):
        ring_buffer(0, 1)


def test_a_sample_may_be_larger_than_the_buffer():
    buffer = ring_buffer(3, 10)
    state = buffer.add(buffer.init(jnp.float32(0)), jnp.array([1.0, 2.0, 3.0]))
    drawn = buffer.sample(jax.random.key(0), state)
    assert drawn.shape == (10,)
    assert set(np.asarray(drawn)) <= {1.0, 2.0, 3.0}
    assert int(num_stored(state)) == 3
