"""The tanh-normal against quadrature, scipy and its own pre-image."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import _standard_errors
from emfuse_jax import distributions

MEAN, LOG_STD = jnp.array([[0.3]]), jnp.array([[-0.5]])


def test_density_integrates_to_one():
    # Midpoints: the density is finite at none of the ends.
    edges = np.linspace(-1.0, 1.0, 20001)
    grid = jnp.asarray(0.5 * (edges[1:] + edges[:-1]), jnp.float32)[:, None]
    rows = jnp.broadcast_to(MEAN, grid.shape), jnp.broadcast_to(LOG_STD, grid.shape)
    density = jnp.exp(distributions.log_prob(*rows, grid))
    np.testing.assert_allclose(density.sum() * 1e-4, 1.0, atol=1e-4)


def test_sample_log_prob_is_the_change_of_variables():
    mean, log_std = jnp.full((64, 2), 0.3), jnp.full((64, 2), -0.5)
    action, log_prob = distributions.sample_and_log_prob(
        jax.random.key(0), mean, log_std
    )
    pre_image = np.arctanh(np.float64(action))
    normal = stats.norm(0.3, np.exp(-0.5)).logpdf(pre_image)
    expected = (normal - np.log1p(-np.square(np.float64(action)))).sum(-1)
    np.testing.assert_allclose(log_prob, expected, atol=1e-4)
    np.testing.assert_allclose(
        distributions.log_prob(mean, log_std, action), log_prob, atol=1e-4
    )
    # Without the Jacobian the values are far away.
    assert np.abs(log_prob - normal.sum(-1)).max() > 0.1


def test_sample_mean_is_the_quadrature_mean():
    action, _ = distributions.sample_and_log_prob(
        jax.random.key(1), jnp.full((20000, 1), 0.3), jnp.full((20000, 1), -0.5)
    )
    u = np.linspace(-8, 8, 20001)
    weights = stats.norm(0.3, np.exp(-0.5)).pdf(u)
    expected = (np.tanh(u) * weights).sum() / weights.sum()
    error = _standard_errors.assert_mean_close(action[:, 0], expected)
    assert abs(np.tanh(0.3) - expected) > 4 * error


def test_value_and_gradient_are_finite_where_tanh_saturates():
    def total(mean, log_std):
        return distributions.sample_and_log_prob(jax.random.key(0), mean, log_std)[
            1
        ].sum()

    for mean in (-20.0, 20.0):
        arguments = jnp.full((4, 2), mean), jnp.zeros((4, 2))
        value, gradients = jax.value_and_grad(total, argnums=(0, 1))(*arguments)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in gradients)


def test_recorded_actions_at_the_bounds_have_a_finite_density_and_gradient():
    def total(mean):
        return distributions.log_prob(
            mean, jnp.zeros((2, 1)), jnp.array([[1.0], [-1.0]])
        ).sum()

    value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 1)))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    # Unclipped, distrax gives NaN.
    raw = distributions._tanh_normal(jnp.zeros(1), jnp.zeros(1))
    with jax.numpy_rank_promotion("allow"):
        assert not np.isfinite(raw.log_prob(jnp.ones(1)))


def test_mode_is_the_median():
    action, _ = distributions.sample_and_log_prob(
        jax.random.key(2), jnp.full((20000, 1), 0.3), jnp.full((20000, 1), -0.5)
    )
    below = (action[:, 0] < distributions.mode(jnp.full(1, 0.3))).astype(jnp.float32)
    _standard_errors.assert_mean_close(below, 0.5)
