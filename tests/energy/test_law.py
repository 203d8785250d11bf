"""The energy law: shifts, temperature, impossible events."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from emfuse_jax import energy as law

boltzmann_log_prob = jax.jit(law.boltzmann_log_prob, static_argnames="axis")
energy_from_logits = jax.jit(law.energy_from_logits)
log_partition = jax.jit(law.log_partition, static_argnames="axis")
ENERGY = np.random.default_rng(0).normal(size=(3, 7)) * 4


def test_log_prob_is_the_log_softmax_of_minus_the_energy():
    with jax.enable_x64(True):
        log_prob = boltzmann_log_prob(jnp.asarray(ENERGY), temperature=0.7)
        expected = scipy.special.log_softmax(-ENERGY / 0.7, axis=-1)
        np.testing.assert_allclose(log_prob, expected, rtol=1e-10)
        np.testing.assert_allclose(
            log_partition(jnp.asarray(ENERGY), axis=0),
            scipy.special.logsumexp(-ENERGY, axis=0),
            rtol=1e-10,
        )


def test_a_constant_changes_nothing():
    with jax.enable_x64(True):
        energy = jnp.asarray(ENERGY)
        shifted = boltzmann_log_prob(energy + jnp.array([[3.0], [-50.0], [1e3]]))
        np.testing.assert_allclose(shifted, boltzmann_log_prob(energy), rtol=1e-10)


def test_temperature_divides_the_energy():
    with jax.enable_x64(True):
        energy = jnp.asarray(ENERGY)
        hot = boltzmann_log_prob(energy, temperature=2.5)
        np.testing.assert_allclose(hot, boltzmann_log_prob(energy / 2.5), rtol=1e-10)
        assert np.abs(hot - boltzmann_log_prob(energy)).max() > 1


def test_energy_from_logits_is_normalised():
    with jax.enable_x64(True):
        logits = jnp.asarray(ENERGY)
        energy = energy_from_logits(logits, temperature=0.5)
        np.testing.assert_allclose(log_partition(energy), 0.0, atol=1e-12)
        assert np.abs(log_partition(-logits)).max() > 1
        np.testing.assert_allclose(
            boltzmann_log_prob(energy),
            scipy.special.log_softmax(2 * ENERGY, axis=-1),
            rtol=1e-10,
        )


def test_masked_events_do_not_exist():
    where = jnp.array([[True, False, True, True, False, True, True]])
    log_prob = boltzmann_log_prob(jnp.asarray(ENERGY, jnp.float32), where=where)
    kept = np.asarray(where[0])
    expected = scipy.special.log_softmax(-ENERGY[:, kept], axis=-1)
    np.testing.assert_allclose(log_prob[:, kept], expected, rtol=1e-5)
    assert (log_prob[:, ~kept] == -jnp.inf).all()


def test_impossible_events_have_no_probability_and_no_gradient():
    energy = jnp.array([1.0, jnp.inf, 2.0])

    @jax.jit
    def first(energy, temperature):
        return boltzmann_log_prob(energy, temperature=temperature)[0]

    value, gradients = jax.value_and_grad(first, argnums=(0, 1))(energy, 1.0)
    np.testing.assert_allclose(value, -np.log1p(np.exp(-1)), rtol=1e-6)
    softmax = np.exp(value)
    np.testing.assert_allclose(
        gradients[0], [-(1 - softmax), 0.0, 1 - softmax], rtol=1e-5
    )
    assert np.isfinite(gradients[1])


def test_no_possible_event_gives_minus_infinity_without_nan():
    energy = jnp.array([[jnp.inf, jnp.inf], [0.0, 1.0]])

    @jax.jit
    def objective(energy):
        log_prob = boltzmann_log_prob(energy)
        return jnp.sum(jnp.where(log_prob == -jnp.inf, 0.0, log_prob))

    assert (boltzmann_log_prob(energy)[0] == -jnp.inf).all()
    assert log_partition(energy)[0] == -jnp.inf
    assert np.isfinite(jax.grad(objective)(energy)).all()


def test_a_nan_energy_is_not_hidden():
    assert np.isnan(boltzmann_log_prob(jnp.array([jnp.nan, 1.0]))).all()


@pytest.mark.parametrize("function", [boltzmann_log_prob, energy_from_logits])
def test_float32_stays_float32(function):
    with jax.enable_x64(True):
        assert function(jnp.zeros(3, jnp.float32)).dtype == jnp.float32
