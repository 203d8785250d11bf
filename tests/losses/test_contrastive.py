"""Contrastive losses: closed forms, gradients and what they converge to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import _standard_errors
from emfuse_jax.losses import contrastive_divergence, info_nce, ranking_nce

RNG = np.random.default_rng(0)
POSITIVE, NEGATIVE = RNG.normal(size=5) * 2, RNG.normal(size=(5, 8)) * 2


@pytest.mark.parametrize("count", [1, 16])
def test_equal_energies_cost_log_of_their_number(count):
    loss = info_nce(jnp.full(3, 7.0), jnp.full((3, count), 7.0))
    np.testing.assert_allclose(loss, np.log(count + 1), rtol=1e-6)


def test_info_nce_is_softmax_cross_entropy():
    with jax.enable_x64(True):
        positive, negative = jnp.asarray(POSITIVE), jnp.asarray(NEGATIVE)
        logits = -jnp.concatenate([positive[:, None], negative], axis=-1) / 0.3
        expected = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.zeros(5, jnp.int32)
        )
        actual = info_nce(positive, negative, temperature=0.3)
        np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_a_shift_of_a_row_changes_nothing():
    with jax.enable_x64(True):
        positive, negative = jnp.asarray(POSITIVE), jnp.asarray(NEGATIVE)
        shift = jnp.arange(5.0) * 100
        shifted = info_nce(positive + shift, negative + shift[:, None])
        np.testing.assert_allclose(shifted, info_nce(positive, negative), rtol=1e-10)


def test_gradient_is_softmax_weights_minus_one_hot():
    with jax.enable_x64(True):
        positive, negative = jnp.asarray(POSITIVE), jnp.asarray(NEGATIVE)

        @jax.jit
        def gradients(positive, negative):
            return jax.grad(
                lambda p, n: jnp.sum(info_nce(p, n, temperature=0.7)), argnums=(0, 1)
            )(positive, negative)

        actual = gradients(positive, negative)
        logits = -np.concatenate([POSITIVE[:, None], NEGATIVE], axis=-1) / 0.7
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(actual[0], (1 - weights[:, 0]) / 0.7, rtol=1e-10)
        np.testing.assert_allclose(actual[1], -weights[:, 1:] / 0.7, rtol=1e-10)


def test_a_small_loss_keeps_its_digits_and_infinity_its_meaning():
    loss = info_nce(jnp.float32(-100.0), jnp.array([-80.0]))
    np.testing.assert_allclose(loss, np.exp(-20), rtol=1e-5)  # not rounded to 0
    impossible = jnp.array([jnp.inf, jnp.inf])
    value, gradient = jax.value_and_grad(info_nce)(jnp.float32(1.0), impossible)
    assert value == 0
    assert gradient == 0


P = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
Q = np.array([0.1, 0.1, 0.2, 0.2, 0.4])


def _population_optimum(loss_of_pair):
    """Energies of five symbols that minimise the exact expected loss, one negative."""
    positive, negative = np.divmod(np.arange(25), 5)
    chances = jnp.asarray(P[positive] * Q[negative])

    def objective(energy):
        return jnp.sum(chances * loss_of_pair(energy, positive, negative))

    @jax.jit
    def newton(energy):
        # Flat along the constant, which the added ones pin.
        hessian = jax.hessian(objective)(energy) + jnp.ones((5, 5))
        return energy - jnp.linalg.solve(hessian, jax.grad(objective)(energy))

    energy = jnp.zeros(5)
    for _ in range(20):
        energy = newton(energy)
    return np.asarray(energy)


def _centered(x):
    return x - x.mean()


def test_info_nce_recovers_the_log_density_ratio():
    with jax.enable_x64(True):
        energy = _population_optimum(
            lambda e, i, j: info_nce(e[i], e[j][:, None]),
        )
        np.testing.assert_allclose(
            _centered(-energy), _centered(np.log(P / Q)), atol=1e-8
        )


def test_ranking_nce_recovers_the_log_density():
    with jax.enable_x64(True):
        log_q = jnp.log(jnp.asarray(Q))
        energy = _population_optimum(
            lambda e, i, j: ranking_nce(
                e[i], e[j][:, None], log_q[i], log_q[j][:, None]
            )
        )
        np.testing.assert_allclose(_centered(-energy), _centered(np.log(P)), atol=1e-8)
        assert np.abs(_centered(-energy) - _centered(np.log(P / Q))).max() > 0.5


def test_ranking_nce_sends_no_gradient_into_the_proposal():
    arrays = (jnp.ones(2), jnp.ones((2, 3)), jnp.zeros(2), jnp.zeros((2, 3)))
    gradients = jax.grad(lambda *a: jnp.sum(ranking_nce(*a)), argnums=(0, 2, 3))(
        *arrays
    )
    assert np.abs(gradients[0]).min() > 0
    assert not gradients[1].any()
    assert not gradients[2].any()


def test_contrastive_divergence_is_the_likelihood_gradient():
    """Zero where the model is the data's law, and not where it is another."""
    key_data, key_model = jax.random.split(jax.random.key(0))
    count, mean, variance = 50_000, 0.7, 2.0
    data = mean + np.sqrt(variance) * jax.random.normal(key_data, (count, 1))
    draws = jax.random.normal(key_model, (count, 1, 1))

    @jax.jit
    def gradients(params):
        def loss(params, target, noise):
            def energy(y):
                return 0.5 * params[1] * jnp.square(y[..., 0] - params[0])

            center, precision = jax.lax.stop_gradient(params)
            negatives = center + noise / jnp.sqrt(precision)
            return contrastive_divergence(energy(target), energy(negatives))

        return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, data, draws)

    samples = np.stack(gradients((mean, 1 / variance)), axis=-1)
    error = _standard_errors.assert_mean_close(samples, [0.0, 0.0])
    wrong = np.stack(gradients((0.5, 0.6)), axis=-1).mean(0)
    assert (np.abs(wrong) > 10 * error).all()
    # d/dμ -log p = Λ (μ - E y) and d/dΛ = ½ (E (y - μ)² - 1/Λ).
    expected = [0.6 * (0.5 - mean), 0.5 * (variance + 0.2**2 - 1 / 0.6)]
    assert (np.abs(wrong - expected) < 5 * error).all()


@pytest.mark.parametrize("loss", [info_nce, contrastive_divergence])
def test_losses_are_per_example_and_stay_float32(loss):
    with jax.enable_x64(True):
        arrays = jnp.ones((4, 2), jnp.float32), jnp.ones((4, 2, 3), jnp.float32)
        result = loss(*arrays)
        assert result.shape == (4, 2)
        assert result.dtype == jnp.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_that_are_not_positive_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature="):
        info_nce(jnp.zeros(2), jnp.zeros((2, 3)), temperature=temperature)
