"""Penalties on energies whose gradients are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.losses import energy_magnitude, gradient_penalty

SLOPE = jnp.array([3.0, -4.0, 12.0])  # Euclidean norm 13, maximum norm 12


def _linear(scale):
    return lambda y: scale * (y @ SLOPE)


@pytest.mark.parametrize(("order", "norm"), [(2, 13.0), (jnp.inf, 12.0)])
@pytest.mark.parametrize(("scale", "margin"), [(1.0, 5.0), (0.3, 5.0), (0.3, 1.0)])
def test_linear_energy(order, norm, scale, margin):
    targets = jax.random.normal(jax.random.key(0), (4, 2, 3))
    penalty = gradient_penalty(_linear(scale), targets, margin=margin, order=order)
    expected = max(scale * norm - margin, 0.0) ** 2
    np.testing.assert_allclose(penalty, np.full((4, 2), expected), rtol=1e-5)


def test_each_target_pays_for_its_own_slope():
    def energy_fn(y):
        return jnp.sum(jnp.square(y), axis=-1)

    targets = jnp.array([[1.0, 0.0], [0.0, 3.0], [3.0, 4.0]])
    penalty = gradient_penalty(energy_fn, targets)
    np.testing.assert_allclose(penalty, [0.0, 1.0, 25.0], rtol=1e-6)


def test_weights_are_trained_through_the_slope():
    def objective(scale):
        return gradient_penalty(_linear(scale), jnp.zeros((1, 3)), margin=1.0)[0]

    value, gradient = jax.jit(jax.value_and_grad(objective))(0.5)
    np.testing.assert_allclose(value, 5.5**2, rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * 5.5 * 13, rtol=1e-6)


@pytest.mark.parametrize("order", [2, jnp.inf])
def test_a_flat_energy_has_no_nan(order):
    def objective(scale):
        targets = jnp.zeros((1, 3))
        penalty = gradient_penalty(_linear(scale), targets, margin=0.0, order=order)
        return penalty[0]

    value, gradient = jax.jit(jax.value_and_grad(objective))(0.0)
    assert value == 0
    assert gradient == 0


def test_unknown_norms_are_named():
    with pytest.raises(ValueError, match="order=1; expected 2"):
        gradient_penalty(_linear(1.0), jnp.zeros((1, 3)), order=1)


def test_energy_magnitude_is_zero_only_at_zero_energy():
    positive, negative = jnp.array([2.0, 0.0]), jnp.array([[1.0, 3.0], [0.0, 0.0]])
    np.testing.assert_allclose(energy_magnitude(positive, negative), [9.0, 0.0])
    np.testing.assert_allclose(
        energy_magnitude(positive + 1, negative + 1), [9.0 + 10.0, 2.0]
    )


def test_float32_stays_float32():
    with jax.enable_x64(True):
        targets = jnp.ones((2, 3), jnp.float32)
        energy = _linear(jnp.float32(2.0))
        assert gradient_penalty(energy, targets).dtype == jnp.float32
        assert energy_magnitude(targets[:, 0], targets).dtype == jnp.float32
