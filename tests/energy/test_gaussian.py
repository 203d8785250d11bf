"""Gaussians: the closed form against quadrature and against the general pool."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from emfuse_jax.energy import (
    Gaussian,
    gaussian_energy,
    gaussian_log_prob,
    pool_energies,
    pool_gaussians,
)

MEAN = np.array([[-1.0, 2.0], [0.5, 0.0], [3.0, 1.0]])
VARIANCE = np.array([[1.0, 0.2], [0.3, 2.0], [4.0, 0.5]])
WEIGHTS = np.array([0.5, 0.3, 0.2])


def _pool(weights=WEIGHTS):
    return pool_gaussians(
        jnp.asarray(MEAN), jnp.asarray(VARIANCE), jnp.asarray(weights)
    )


def test_log_prob_is_scipys():
    with jax.enable_x64(True):
        position = np.random.default_rng(0).normal(size=(5, 2))
        gaussian = Gaussian(jnp.asarray(MEAN[0]), jnp.asarray(VARIANCE[0]))
        expected = scipy.stats.norm(MEAN[0], np.sqrt(VARIANCE[0])).logpdf(position)
        actual = gaussian_log_prob(gaussian, jnp.asarray(position))
        np.testing.assert_allclose(actual, expected.sum(-1), rtol=1e-10)
        energy = gaussian_energy(gaussian)(jnp.asarray(position))
        np.testing.assert_allclose(np.ptp(energy + actual), 0.0, atol=1e-10)


def test_pool_adds_precisions_and_weighs_means_by_them():
    with jax.enable_x64(True):
        pooled = _pool()
        precision = (WEIGHTS[:, None] / VARIANCE).sum(0)
        mean = (WEIGHTS[:, None] * MEAN / VARIANCE).sum(0) / precision
        np.testing.assert_allclose(pooled.variance, 1 / precision, rtol=1e-10)
        np.testing.assert_allclose(pooled.mean, mean, rtol=1e-10)
        assert np.abs(mean - WEIGHTS @ MEAN).max() > 0.3


def test_pool_is_the_normalised_product_by_quadrature():
    grid = np.linspace(-15, 15, 20_001)[:, None]
    densities = scipy.stats.norm(MEAN[:, :1], np.sqrt(VARIANCE[:, :1])).pdf(grid.T)
    product = np.prod(densities ** WEIGHTS[:, None], axis=0)
    product /= product.sum()
    mean = product @ grid[:, 0]
    variance = product @ (grid[:, 0] - mean) ** 2
    with jax.enable_x64(True):
        pooled = _pool()
        np.testing.assert_allclose(pooled.mean[0], mean, rtol=1e-10)
        np.testing.assert_allclose(pooled.variance[0], variance, rtol=1e-10)


def test_pooled_energies_of_gaussians_are_the_energy_of_the_pool():
    with jax.enable_x64(True):
        members = [
            gaussian_energy(Gaussian(jnp.asarray(m), jnp.asarray(v)))
            for m, v in zip(MEAN, VARIANCE, strict=True)
        ]
        position = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2)) * 3)
        fused = pool_energies(members, jnp.asarray(WEIGHTS))(position)
        difference = fused - gaussian_energy(_pool())(position)
        np.testing.assert_allclose(np.ptp(difference), 0.0, atol=1e-10)
        np.testing.assert_array_less(1.0, np.ptp(fused))


def test_a_blind_member_of_zero_weight_is_ignored():
    mean = jnp.array([[1.0], [jnp.inf]])
    variance = jnp.array([[2.0], [jnp.inf]])
    pooled = pool_gaussians(mean, variance, jnp.array([1.0, 0.0]))
    np.testing.assert_allclose([pooled.mean[0], pooled.variance[0]], [1.0, 2.0])


def test_weights_of_each_row():
    mean = jnp.broadcast_to(jnp.asarray(MEAN, jnp.float32)[:, None], (3, 4, 2))
    variance = jnp.broadcast_to(jnp.asarray(VARIANCE, jnp.float32)[:, None], (3, 4, 2))
    rows = jnp.eye(3, 4).at[:, 3].set(jnp.asarray(WEIGHTS, jnp.float32))
    pooled = pool_gaussians(mean, variance, rows)
    np.testing.assert_allclose(pooled.mean[:3], MEAN, rtol=1e-6)
    np.testing.assert_allclose(pooled.mean[3], _pool().mean, rtol=1e-5)


def test_float32_stays_float32():
    with jax.enable_x64(True):
        arrays = (jnp.asarray(x, jnp.float32) for x in (MEAN, VARIANCE, WEIGHTS))
        pooled = pool_gaussians(*arrays)
        assert {leaf.dtype for leaf in pooled} == {jnp.dtype("float32")}
        assert gaussian_log_prob(pooled, pooled.mean).dtype == jnp.float32
