"""The log-opinion pool: its laws, its vetoes, and the check on weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import emfuse_jax.energy
from emfuse_jax.energy import (
    align_weights,
    check_weights,
    energy_from_logits,
    pool_energies,
    weighted_energy,
)

LOG_PROBS = scipy.special.log_softmax(
    np.random.default_rng(1).normal(size=(3, 4, 6)) * 2, axis=-1
)
WEIGHTS = np.array([0.5, 0.3, 0.2])
log_opinion_pool = jax.jit(
    emfuse_jax.energy.log_opinion_pool, static_argnames="normalize"
)


def test_pool_is_the_softmax_of_the_weighted_sum():
    with jax.enable_x64(True):
        pooled = log_opinion_pool(jnp.asarray(LOG_PROBS), jnp.asarray(WEIGHTS))
        total = np.tensordot(WEIGHTS, LOG_PROBS, axes=1)
        expected = scipy.special.log_softmax(total, axis=-1)
        np.testing.assert_allclose(pooled, expected, rtol=1e-10)
        arithmetic = np.log(np.tensordot(WEIGHTS, np.exp(LOG_PROBS), axes=1))
        assert np.abs(pooled - arithmetic).max() > 0.1
        unnormalised = log_opinion_pool(
            jnp.asarray(LOG_PROBS), jnp.asarray(WEIGHTS), normalize=False
        )
        np.testing.assert_allclose(unnormalised, total, rtol=1e-10)


def test_one_hot_weights_return_that_member():
    with jax.enable_x64(True):
        for index, weights in enumerate(jnp.eye(3)):
            pooled = log_opinion_pool(jnp.asarray(LOG_PROBS), weights)
            np.testing.assert_allclose(pooled, LOG_PROBS[index], rtol=1e-10)


def test_identical_members_pool_to_themselves_iff_the_weights_sum_to_one():
    with jax.enable_x64(True):
        same = jnp.asarray(np.stack([LOG_PROBS[0]] * 3))
        pooled = log_opinion_pool(same, jnp.asarray(WEIGHTS))
        np.testing.assert_allclose(pooled, LOG_PROBS[0], rtol=1e-10)
        sharper = log_opinion_pool(same, jnp.asarray(2 * WEIGHTS))
        assert np.abs(sharper - LOG_PROBS[0]).max() > 0.1


def test_pool_is_externally_bayesian_iff_the_weights_sum_to_one():
    with jax.enable_x64(True):
        log_probs = jnp.asarray(LOG_PROBS)
        likelihood = jnp.asarray(np.random.default_rng(2).normal(size=(1, 1, 6)))

        def update(log_prob):
            return -energy_from_logits(
                log_prob + jnp.broadcast_to(likelihood[0, 0], log_prob.shape)
            )

        def gap(weights):
            before = log_opinion_pool(update(log_probs), weights)
            return np.abs(before - update(log_opinion_pool(log_probs, weights))).max()

        assert gap(jnp.asarray(WEIGHTS)) < 1e-10
        assert gap(jnp.asarray(0.7 * WEIGHTS)) > 0.1


def test_weights_may_differ_by_row():
    rows = np.random.default_rng(3).dirichlet(np.ones(3), size=4).T
    pooled = log_opinion_pool(
        jnp.asarray(LOG_PROBS, jnp.float32), jnp.asarray(rows, jnp.float32)
    )
    for row in range(4):
        alone = log_opinion_pool(
            jnp.asarray(LOG_PROBS[:, row], jnp.float32),
            jnp.asarray(rows[:, row], jnp.float32),
        )
        np.testing.assert_allclose(pooled[row], alone, rtol=1e-5)


def test_zero_weight_on_an_impossible_event_has_no_effect():
    log_probs = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]))
    pooled = log_opinion_pool(log_probs, jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(jnp.exp(pooled), [0.5, 0.25, 0.25], rtol=1e-6)
    vetoed = log_opinion_pool(log_probs, jnp.array([0.999, 0.001]))
    np.testing.assert_allclose(jnp.exp(vetoed), [0.0, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("first", [1.0, 0.9])
def test_impossible_events_leave_no_nan_in_any_gradient(first):
    log_probs = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.0, 0.6, 0.4]]))
    weights = jnp.array([first, 1 - first])

    def objective(weights, log_probs):
        return log_opinion_pool(log_probs, weights)[1]

    gradients = jax.grad(objective, argnums=(0, 1))(weights, log_probs)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert np.abs(gradients[1][0, 1]) > 0


def test_members_that_veto_everything_leave_nothing():
    log_probs = jnp.log(jnp.eye(2))
    pooled = log_opinion_pool(log_probs, jnp.array([0.5, 0.5]))
    assert (pooled == -jnp.inf).all()


def _bowl(center, scale=1.0):
    return lambda y: scale * jnp.sum(jnp.square(y - center), axis=-1)


def test_pooled_energy_and_its_gradient_are_weighted_sums():
    members = [_bowl(0.0), _bowl(1.0, 3.0), lambda y: jnp.sum(jnp.cos(y), axis=-1)]
    position = jax.random.normal(jax.random.key(0), (5, 2))
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    fused = pool_energies(members, weights)

    @jax.jit
    def evaluate(position):
        functions = [*members, fused]
        gradients = [
            jax.grad(lambda y, e=e: jnp.sum(e(y)))(position) for e in functions
        ]
        return jnp.stack([e(position) for e in functions]), jnp.stack(gradients)

    energies, gradients = map(np.asarray, evaluate(position))
    np.testing.assert_allclose(
        energies[-1], np.tensordot(WEIGHTS, energies[:-1], 1), rtol=1e-6
    )
    np.testing.assert_allclose(
        gradients[-1], np.tensordot(WEIGHTS, gradients[:-1], 1), rtol=1e-5
    )


def test_pooled_energy_takes_traced_weights_of_each_row():
    rows = jnp.array([[1.0, 0.25], [0.0, 0.75]])
    position = jnp.array([[2.0], [3.0]])

    @jax.jit
    def pooled(weights):
        return pool_energies([_bowl(0.0), _bowl(1.0)], weights)(position)

    np.testing.assert_allclose(pooled(rows), [4.0, 0.25 * 9 + 0.75 * 4], rtol=1e-6)


def test_a_member_of_zero_weight_cannot_spoil_the_gradient():
    def cusp(y):
        return jnp.sqrt(jnp.sum(jnp.abs(y - 2.0), axis=-1))

    position = jnp.array([2.0])
    assert np.isnan(jax.grad(lambda y: 0.0 * cusp(y))(position)).all()
    fused = pool_energies([_bowl(0.0), cusp], jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(jax.jit(jax.grad(fused))(position), [4.0])


def test_infinite_energy_is_a_veto_only_with_weight():
    energies = jnp.array([[1.0, 1.0], [jnp.inf, jnp.inf]])
    weights = jnp.array([[1.0, 0.5], [0.0, 0.5]])
    assert weighted_energy(energies, weights).tolist() == [1.0, np.inf]
    gradient = jax.grad(lambda w: weighted_energy(energies, w)[0])(weights)
    assert np.isfinite(gradient).all()


def test_one_weight_per_member_is_asked_for():
    with pytest.raises(ValueError, match="2 energy functions and weights of shape"):
        pool_energies([_bowl(0.0), _bowl(1.0)], jnp.ones(3))
    with pytest.raises(ValueError, match=r"fit neither \[model\] nor"):
        align_weights(jnp.ones((2, 3)), (2, 4))
    with pytest.raises(ValueError, match=r"fit neither \[model\] nor"):
        align_weights(jnp.ones(1), (2, 4))


def test_checked_weights_come_back():
    np.testing.assert_array_equal(check_weights([0.25, 0.75], 2), [0.25, 0.75])
    np.testing.assert_array_equal(check_weights(np.eye(2), 2), np.eye(2))
    check_weights([0.33333, 0.33333, 0.33333], 3)
    assert jax.jit(lambda w: check_weights(w, 2))(jnp.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.5, 0.0], "expected one for each of the 2 experts"),
        (1.0, "expected one for each of the 2 experts"),
        ([1.5, -0.5], r"weights \[ ?1.5, -0.5\] hold a negative"),
        ([np.nan, 1.0], "non-finite value"),
        ([0.5, 0.3], r"sum to 0.8, expected 1; divide .* \[0.625, 0.375\]"),
        ([0.0, 0.0], "sum to 0, expected 1"),
        (np.full((2, 3), 0.4), "sum to 0.8, expected 1"),
    ],
)
def test_bad_weights_are_named_with_the_fix(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights, 2)


def test_float32_stays_float32():
    with jax.enable_x64(True):
        weights = jnp.asarray(WEIGHTS, jnp.float32)
        assert check_weights(weights, 3).dtype == jnp.float32
        log_probs = jnp.asarray(LOG_PROBS, jnp.float32)
        assert log_opinion_pool(log_probs, weights).dtype == jnp.float32
        fused = pool_energies([_bowl(0.0)] * 3, weights)
        assert fused(jnp.zeros((2, 1), jnp.float32)).dtype == jnp.float32
