"""The pool under any weights, masks and shapes: a law of numpy's, or a refusal by name."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies as st

from emfuse_jax.energy import (
    align_weights,
    check_weights,
    log_opinion_pool,
    pool_energies,
)

EVENTS = 4
BATCHES = st.sampled_from([(), (2, 3)])  # few: each is compiled
pool = jax.jit(log_opinion_pool)
SIZES = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def some_weights(rng, shape):
    """Convex over the first axis, some of them zero."""
    weights = rng.dirichlet(np.ones(shape[0]), size=shape[1:])
    weights = np.moveaxis(weights, -1, 0) * (rng.random(shape) < 0.7)
    total = weights.sum(0)
    weights[0] += total == 0
    return (weights / weights.sum(0)).astype(np.float32)


def some_log_probs(rng, shape):
    """Distributions over the last axis, some of whose events are impossible."""
    logits = 3 * rng.standard_normal(shape)
    logits[rng.random(shape) < 0.2] = -np.inf
    logits[..., 0] = np.where(np.isinf(logits).all(-1), 0.0, logits[..., 0])
    return scipy.special.log_softmax(logits, axis=-1).astype(np.float32)


def expected_pool(log_probs, weights):
    """In float64, member by member; the second value tells what is vetoed."""
    total = np.zeros(log_probs.shape[1:])
    vetoed = np.zeros(total.shape, bool)
    for log_prob, weight in zip(log_probs.astype(np.float64), weights, strict=True):
        weight = np.broadcast_to(np.expand_dims(weight, -1), total.shape)
        finite = np.where(np.isinf(log_prob), 0.0, log_prob)
        total += weight.astype(np.float64) * finite
        vetoed |= np.isinf(log_prob) & (weight > 0)
    total[vetoed] = -np.inf
    whole = scipy.special.logsumexp(total, axis=-1, keepdims=True)
    return np.where(
        vetoed, -np.inf, total - np.where(np.isinf(whole), 0, whole)
    ), vetoed


@hypothesis.given(
    seed=st.integers(0, 2**32),
    num_models=st.sampled_from([1, 3]),
    batch=BATCHES,
    by_row=st.booleans(),
)
def test_any_pool_is_the_law_and_its_order_is_none(seed, num_models, batch, by_row):
    rng = np.random.default_rng(seed)
    log_probs = some_log_probs(rng, (num_models, *batch, EVENTS))
    weights = some_weights(rng, (num_models, *(batch if by_row else ())))
    check_weights(weights, num_models)
    pooled = np.asarray(pool(log_probs, weights))
    expected, vetoed = expected_pool(log_probs, weights)
    assert pooled.shape == (*batch, EVENTS)
    np.testing.assert_array_equal(np.isneginf(pooled), vetoed)
    np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-4)
    left = ~vetoed.all(-1)
    np.testing.assert_allclose(np.exp(pooled).sum(-1)[left], 1.0, rtol=1e-5)
    order = rng.permutation(num_models)
    again = pool(log_probs[order], weights[order])
    np.testing.assert_allclose(again, pooled, rtol=1e-5, atol=1e-5)


@jax.jit
def pool_of_bowls(centers, weights, position):
    def bowl(center):
        return lambda y: jnp.sum(jnp.square(y - jnp.broadcast_to(center, y.shape)), -1)

    return pool_energies([bowl(center) for center in centers], weights)(position)


@hypothesis.given(seed=st.integers(0, 2**32), batch=BATCHES, by_row=st.booleans())
def test_any_pooled_energy_is_the_sum_of_its_members(seed, batch, by_row):
    rng = np.random.default_rng(seed)
    weights = some_weights(rng, (2, *(batch if by_row else ())))
    centers = rng.standard_normal((2, 1)).astype(np.float32)
    position = rng.standard_normal((*batch, 3)).astype(np.float32)
    found = pool_of_bowls(centers, weights, position)
    energies = np.stack([np.square(position - c).sum(-1) for c in centers])
    aligned = weights if by_row else weights.reshape(2, *[1] * len(batch))
    np.testing.assert_allclose(found, (aligned * energies).sum(0), rtol=1e-5)


NUMBERS = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, 0.5, 1.0, 0.25, 1 / 3, -0.5, 2.0])
)


@hypothesis.given(st.lists(NUMBERS, max_size=4), st.integers(1, 4))
def test_any_numbers_are_weights_or_refused(numbers, num_models):
    values = np.asarray(numbers, np.float64)
    right = (
        len(numbers) == num_models
        and np.isfinite(values).all()
        and (values >= 0).all()
        and abs(values.sum() - 1) <= 1e-4
    )
    try:
        found = np.asarray(check_weights(numbers, num_models))
    except ValueError as error:
        hypothesis.note(str(error))
        assert not right
        return
    assert right
    np.testing.assert_allclose(found, values, rtol=1e-6)


@pytest.mark.untyped  # shapes alone, which the annotations would refuse first
@hypothesis.given(SIZES, SIZES)
def test_any_shapes_are_aligned_or_refused(shape, wanted):
    wanted = (*wanted, 2)[: max(1, len(wanted))]  # at least the models
    fits = shape == wanted[:1] or (
        len(shape) == len(wanted)
        and shape[0] == wanted[0]
        and all(a in (1, b) for a, b in zip(shape[1:], wanted[1:], strict=True))
    )
    try:
        aligned = align_weights(np.ones(shape, np.float32), wanted)
    except ValueError:
        assert not fits
        return
    assert fits
    assert np.broadcast_shapes(aligned.shape, wanted) == wanted
    assert aligned.size == np.prod(shape)
