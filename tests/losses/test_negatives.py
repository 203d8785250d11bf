"""Negatives: their law, their density, and that no gradient flows into them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import _standard_errors
from emfuse_jax.losses import (
    chain_negatives,
    gaussian_mixture_log_prob,
    gaussian_mixture_proposal,
    uniform_negatives,
)
from emfuse_jax.samplers import etm_langevin

SCALES, WEIGHT = (1.0, 3.0, 8.0), 0.25
LOW, HIGH = np.array([-2.0, -1.0]), np.array([4.0, 2.0])
MEAN, STD = np.array([0.5, -0.2]), np.array([0.3, 0.1])


def _scipy_density(y, box):
    density = 0.0
    for scale in SCALES:
        density += scipy.stats.norm(MEAN, scale * STD).pdf(y).prod(-1) / len(SCALES)
    if not box:
        return density
    inside = ((y >= LOW) & (y <= HIGH)).all(-1)
    return (1 - WEIGHT) * density + WEIGHT * inside / (HIGH - LOW).prod()


def test_uniform_negatives_fill_their_box():
    draws = uniform_negatives(jax.random.key(0), (2000, 8, 2), LOW, HIGH)
    assert draws.dtype == jnp.float32
    flat = np.asarray(draws).reshape(-1, 2)
    assert (flat >= LOW).all()
    assert (flat <= HIGH).all()
    _standard_errors.assert_mean_close(flat, (LOW + HIGH) / 2)
    _standard_errors.assert_mean_close(
        (flat - (LOW + HIGH) / 2) ** 2, (HIGH - LOW) ** 2 / 12
    )


@pytest.mark.parametrize("box", [False, True])
def test_mixture_density_is_scipys(box):
    with jax.enable_x64(True):
        targets = np.random.default_rng(0).normal(size=(40, 2)) * 1.5 + MEAN
        options = {"box": (LOW, HIGH), "box_weight": WEIGHT} if box else {}
        log_prob = gaussian_mixture_log_prob(
            jnp.asarray(targets), jnp.asarray(MEAN), jnp.asarray(STD), SCALES, **options
        )
        expected = np.log(_scipy_density(targets, box))
        np.testing.assert_allclose(log_prob, expected, rtol=1e-10)


@pytest.fixture(scope="module")
def draws():
    mean = jnp.broadcast_to(jnp.asarray(MEAN, jnp.float32), (4, 2))
    std = jnp.broadcast_to(jnp.asarray(STD, jnp.float32), (4, 2))
    sample = jax.jit(
        lambda key: gaussian_mixture_proposal(
            key, mean, std, SCALES, 10_000, box=(LOW, HIGH), box_weight=WEIGHT
        )
    )
    return [np.asarray(x, np.float64) for x in sample(jax.random.key(1))]


def test_draws_carry_their_density(draws):
    targets, log_prob = draws
    assert targets.shape == (4, 10_000, 2)
    expected = np.log(_scipy_density(targets, box=True))
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)


def test_draws_follow_their_density(draws):
    """Importance weights of a known law average to one, so does a test function."""
    targets, log_prob = draws
    target = scipy.stats.norm(MEAN, 2 * STD)
    ratio = target.pdf(targets).prod(-1) / np.exp(log_prob)
    error = _standard_errors.assert_mean_close(ratio.ravel(), 1.0)
    assert error < 0.02
    squares = ratio[..., None] * ((targets - MEAN) / (2 * STD)) ** 2
    _standard_errors.assert_mean_close(squares.reshape(-1, 2), [1.0, 1.0])
    # Without the box the density of the same draws would not do.
    inside = np.exp(log_prob) - WEIGHT / (HIGH - LOW).prod()
    wrong = target.pdf(targets).prod(-1) / (inside / (1 - WEIGHT))
    assert abs(wrong.mean() - 1) > 10 * error


def test_each_component_has_its_share(draws):
    targets, _ = draws
    far = (np.abs(targets - MEAN) > 6 * 8 * STD).any(-1)  # reached by the box alone
    box = np.stack([LOW, HIGH])
    reach = np.clip(box, MEAN - 48 * STD, MEAN + 48 * STD)
    near = (reach[1] - reach[0]).prod() / (HIGH - LOW).prod()
    _standard_errors.assert_mean_close(far.ravel(), WEIGHT * (1 - near), axis=0)


def test_density_at_positives_and_at_draws_agree():
    keys = jax.random.split(jax.random.key(0), 3)
    mean, std = jax.random.normal(keys[0], (5, 2)), jnp.ones((5, 2))
    targets = jax.random.normal(keys[1], (5, 3, 2))
    box = (mean - 2.0, mean + 2.0)

    @jax.jit
    def log_prob(targets):
        return gaussian_mixture_log_prob(targets, mean, std, SCALES, box=box)

    together = log_prob(targets)
    for index in range(3):
        alone = log_prob(targets[:, index])
        np.testing.assert_allclose(together[:, index], alone, rtol=1e-5)


def test_density_far_out_is_finite_with_a_finite_gradient():
    @jax.jit
    @jax.value_and_grad
    def log_prob(target):
        mean, std = jnp.zeros(2), jnp.full(2, 0.5)
        return gaussian_mixture_log_prob(target, mean, std, SCALES, box=(-1.0, 1.0))

    for target in (jnp.array([300.0, 0.0]), jnp.array([0.0, 0.0])):
        value, gradient = log_prob(target)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_draws_send_no_gradient_into_the_head():
    def objective(mean, std):
        draws, log_prob = gaussian_mixture_proposal(
            jax.random.key(0), mean, std, SCALES, 4
        )
        return jnp.sum(draws) + jnp.sum(log_prob)

    gradients = jax.jit(jax.grad(objective, argnums=(0, 1)))(
        jnp.zeros((3, 2)), jnp.ones((3, 2))
    )
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("scales", "options", "message"),
    [
        ((), {}, "scales is empty"),
        ((1.0, -3.0), {}, r"scales=\(1.0, -3.0\)"),
        ((1.0,), {"box": (-1.0, 1.0), "box_weight": 0.0}, "box_weight=0.0"),
        ((1.0,), {"box": (-1.0, 1.0), "box_weight": 1.0}, "box_weight=1.0"),
    ],
)
def test_bad_mixtures_are_named(scales, options, message):
    ones = jnp.ones((1, 2))
    with pytest.raises(ValueError, match=message):
        gaussian_mixture_proposal(jax.random.key(0), ones, ones, scales, 2, **options)


def _energy(slope, y):
    return jnp.sum(jnp.square(y - slope), axis=-1)


def _chain_objective(slope, key, initial, stopped):
    sampler = etm_langevin(lambda y: _energy(slope, y), 20)
    targets = chain_negatives(key, sampler, initial, 20)
    return jnp.sum(
        _energy(slope, jax.lax.stop_gradient(targets) if stopped else targets)
    )


def test_chain_negatives_end_lower_than_they_began():
    key, initial = jax.random.key(0), jnp.ones((5, 4, 2)) * 0.9
    sampler = etm_langevin(lambda y: _energy(-0.5, y), 20)
    targets = jax.jit(lambda k, y: chain_negatives(k, sampler, y, 20))(key, initial)
    assert targets.shape == initial.shape
    assert (_energy(-0.5, targets) < 0.5 * _energy(-0.5, initial)).all()


def test_chain_negatives_send_no_gradient_through_the_chain():
    initial = jnp.full((3, 2), 0.4)
    gradient = jax.jit(jax.grad(_chain_objective, argnums=(0, 2)), static_argnums=3)
    plain = gradient(jnp.float32(0.1), jax.random.key(0), initial, False)
    stopped = gradient(jnp.float32(0.1), jax.random.key(0), initial, True)
    assert plain[0] == stopped[0] != 0
    assert not plain[1].any()


def test_chain_negatives_prepare_no_backward_pass():
    """A stop on the result alone would keep every step's residuals in the scan."""
    jaxpr = jax.make_jaxpr(jax.grad(_chain_objective), static_argnums=3)(
        jnp.float32(0.1), jax.random.key(0), jnp.ones((3, 2)), False
    )
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(scans) == 1
    assert len(scans[0].outvars) == 2  # position and step, nothing stacked
