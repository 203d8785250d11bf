"""Divergences against scipy, Monte Carlo and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import _standard_errors
from emfuse_jax import energy
from emfuse_jax.energy import Gaussian, gaussian_log_prob, pool_gaussians

categorical_js = jax.jit(energy.categorical_js)
categorical_kl = jax.jit(energy.categorical_kl)
gaussian_geometric_js = jax.jit(energy.gaussian_geometric_js)
gaussian_kl = jax.jit(energy.gaussian_kl)

PROBS = np.random.default_rng(0).dirichlet(np.ones(6), size=(3, 4))


def test_categorical_kl_is_scipys():
    with jax.enable_x64(True):
        log_p, log_q = jnp.log(jnp.asarray(PROBS[:2]))
        expected = scipy.stats.entropy(PROBS[0], PROBS[1], axis=-1)
        np.testing.assert_allclose(categorical_kl(log_p, log_q), expected, rtol=1e-10)
        assert np.abs(categorical_kl(log_q, log_p) - expected).max() > 0.1


def test_categorical_kl_of_impossible_events():
    certain, fair = jnp.log(jnp.array([[1.0, 0.0], [0.5, 0.5]]))
    np.testing.assert_allclose(categorical_kl(certain, fair), np.log(2), rtol=1e-6)
    assert categorical_kl(fair, certain) == jnp.inf
    np.testing.assert_allclose(categorical_kl(certain, certain), 0.0)
    gradients = jax.grad(categorical_kl, argnums=(0, 1))(certain, fair)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_categorical_js_is_the_entropy_of_the_mixture_minus_the_mean_entropy():
    with jax.enable_x64(True):
        weights = np.array([0.2, 0.3, 0.5])
        actual = categorical_js(jnp.log(jnp.asarray(PROBS)), jnp.asarray(weights))
        mixture = np.tensordot(weights, PROBS, axes=1)
        entropies = scipy.stats.entropy(PROBS, axis=-1)
        expected = scipy.stats.entropy(mixture, axis=-1) - weights @ entropies
        np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_categorical_js_is_bounded_by_the_entropy_of_the_weights():
    weights = jnp.array([0.2, 0.3, 0.5])
    disjoint = jnp.log(jnp.eye(3))
    value, gradient = jax.value_and_grad(categorical_js)(disjoint, weights)
    np.testing.assert_allclose(value, scipy.stats.entropy(weights), rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(
        categorical_js(disjoint, jnp.array([1.0, 0.0, 0.0])), 0.0, atol=1e-7
    )


def test_gaussian_kl_is_the_mean_log_ratio():
    p = Gaussian(jnp.array([0.5, -1.0]), jnp.array([0.4, 2.0]))
    q = Gaussian(jnp.array([0.0, 0.0]), jnp.array([1.0, 0.7]))
    noise = jax.random.normal(jax.random.key(0), (100_000, 2))
    draws = jnp.broadcast_to(p.mean, noise.shape) + noise * jnp.sqrt(
        jnp.broadcast_to(p.variance, noise.shape)
    )
    ratios = gaussian_log_prob(p, draws) - gaussian_log_prob(q, draws)
    error = _standard_errors.assert_mean_close(ratios, gaussian_kl(p, q))
    assert np.abs(gaussian_kl(q, p) - gaussian_kl(p, q)) > 10 * error
    np.testing.assert_allclose(gaussian_kl(p, p), 0.0, atol=1e-6)


def test_geometric_js_is_the_weighted_divergence_from_the_pool():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        mean = jnp.asarray(rng.normal(size=(3, 5, 2)))
        variance = jnp.asarray(rng.uniform(0.2, 3.0, size=(3, 5, 2)))
        weights = jnp.asarray(rng.dirichlet(np.ones(3), size=5).T)
        pool = pool_gaussians(mean, variance, weights)
        expected = sum(
            w * gaussian_kl(Gaussian(m, v), pool)
            for w, m, v in zip(weights, mean, variance, strict=True)
        )
        actual = gaussian_geometric_js(mean, variance, weights)
        np.testing.assert_allclose(actual, expected, rtol=1e-10)
        assert (actual > 0).all()
        same = jnp.broadcast_to(mean[:1], mean.shape)
        alike = jnp.broadcast_to(variance[:1], mean.shape)
        np.testing.assert_allclose(
            gaussian_geometric_js(same, alike, weights), 0.0, atol=1e-10
        )
