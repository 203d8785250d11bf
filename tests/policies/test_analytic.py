"""The intermediate energy and the posterior variance against closed forms and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.policies import _analytic, _vp

BETA = 2.0
SLOPE = np.array([1.0, -0.5, 0.25])
rng = np.random.default_rng(0)


def log_mean_exp(values):
    """Of draws, with its standard error."""
    peak = values.max()
    weight = np.exp(values - peak)
    error = weight.std() / weight.mean() / np.sqrt(len(weight))
    return np.log(weight.mean()) + peak, error


@pytest.mark.parametrize("point", [[0.0, 0.0, 0.0], [2.0, -1.0, 0.3]])
def test_the_energy_of_a_linear_value_is_the_log_mean_exp_whatever_the_point(point):
    mean, variance, offset = np.array([0.4, 0.1, -0.6]), 0.21, 0.7
    draws = mean + np.sqrt(variance) * rng.standard_normal((200_000, 3))
    truth, error = log_mean_exp(BETA * (draws @ SLOPE + offset))
    energy = _analytic.first_order_energy(
        jnp.asarray(SLOPE @ np.array(point) + offset),
        jnp.asarray(SLOPE),
        jnp.asarray(mean - np.array(point)),
        jnp.asarray(variance),
        inverse_temperature=BETA,
    )
    assert abs(-energy - truth) < 4 * error + 1e-5
    without = BETA * (SLOPE @ mean + offset)  # what the quadratic term corrects
    assert abs(without - truth) > 40 * error


def quadratic(curvature, goal):
    """``Q = -½ (a - g)ᵀ H (a - g)``: value, gradient and Hessian anywhere."""

    def at(point):
        gap = point - goal
        return -0.5 * gap @ curvature @ gap, -curvature @ gap, -curvature

    return at


def exact_quadratic(curvature, goal, mean, variance):
    """The paper's ``E_t`` (high is good)."""
    precision = np.eye(3) + BETA * variance * curvature
    gap = mean - goal
    pull = gap @ curvature @ np.linalg.solve(precision, gap)
    return -0.5 * np.linalg.slogdet(precision)[1] - 0.5 * BETA * pull


def test_the_second_order_form_is_exact_for_concave_quadratics():
    root = rng.standard_normal((3, 3))
    curvature, goal, mean = root @ root.T, np.array([0.5, 0.0, -0.2]), np.ones(3) * 0.3
    at, truth = quadratic(curvature, goal), exact_quadratic(curvature, goal, mean, 0.4)
    for point in (mean, np.zeros(3), np.array([1.0, -2.0, 0.5])):
        value, gradient, hessian = map(jnp.asarray, at(point))
        offset, variance = jnp.asarray(mean - point), jnp.asarray(0.4)
        second = _analytic.second_order_energy(
            value, gradient, hessian, offset, variance, inverse_temperature=BETA
        )
        np.testing.assert_allclose(-second, truth, rtol=2e-5)
        first = _analytic.first_order_energy(
            value, gradient, offset, variance, inverse_temperature=BETA
        )
        assert abs(-first - truth) > 0.1
    draws = mean + np.sqrt(0.4) * rng.standard_normal((100_000, 3))
    gap = draws - goal
    sampled, error = log_mean_exp(
        -0.5 * BETA * np.einsum("ni,ij,nj->n", gap, curvature, gap)
    )
    assert abs(sampled - truth) < 4 * error


def test_a_convex_direction_counts_as_linear():
    inputs = jnp.array(0.3), jnp.asarray(SLOPE)
    rest = jnp.ones(3), jnp.array(0.5)
    second = _analytic.second_order_energy(
        *inputs, 5.0 * jnp.eye(3), *rest, inverse_temperature=BETA
    )
    first = _analytic.first_order_energy(*inputs, *rest, inverse_temperature=BETA)
    np.testing.assert_allclose(second, first, rtol=1e-6)


@pytest.mark.parametrize(
    ("strength", "ratio"), [(0.05, 0.9975), (0.2, 0.96), (0.5, 0.75), (1, 0), (2, -3)]
)
def test_the_first_order_guidance_flips_its_sign_where_the_value_is_sharp(
    strength, ratio
):
    """``β h v`` of 2 pushes three times as hard away as the exact form pulls."""
    variance, goal = 0.5, 0.8
    curvature = strength / (BETA * variance)

    def slope(form, *, at_mean):
        def energy(mean):
            # Quadrature over recorded actions a_0 ~ N(mean, v), or their mean alone.
            nodes, weights = np.polynomial.hermite_e.hermegauss(5)
            if at_mean:
                nodes, weights = np.zeros(1), np.ones(1)
            total = 0.0
            for node, weight in zip(nodes, weights / weights.sum(), strict=True):
                point = mean + np.sqrt(variance) * node
                value = -0.5 * curvature * (point - goal) ** 2
                gradient = -curvature * (point - goal)
                total += weight * form(value, gradient[None], (mean - point)[None])
            return total

        return jax.grad(energy)(0.3)

    def first(value, gradient, offset):
        return _analytic.first_order_energy(
            value, gradient, offset, jnp.array(variance), inverse_temperature=BETA
        )

    def second(value, gradient, offset):
        return _analytic.second_order_energy(
            value,
            gradient,
            jnp.array([[-curvature]]),
            offset,
            jnp.array(variance),
            inverse_temperature=BETA,
        )

    exact = BETA * curvature * (0.3 - goal) / (1 + strength)
    for at_mean in (True, False):  # both expansion points: the same gradient
        np.testing.assert_allclose(
            slope(first, at_mean=at_mean), ratio * exact, atol=2e-5
        )
        np.testing.assert_allclose(slope(second, at_mean=at_mean), exact, rtol=1e-4)


TIMES = np.array([0.02, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0])


def gaussian_moments(variance):
    """Exact ``E|ε|²/d``, ``E|m - E a_0|²/d`` and posterior variance of N(·, variance I)."""
    alpha, sigma = (np.asarray(x, np.float64) for x in _vp.alpha_sigma(TIMES))
    total = alpha**2 * variance + sigma**2
    return (
        sigma**2 / total,
        (alpha * variance) ** 2 / total,
        variance * sigma**2 / total,
    )


def test_both_identities_give_the_variance_of_a_gaussian():
    noise_square, deviation, truth = gaussian_moments(0.25)
    by_action = _analytic.variance_from_action(0.25, deviation)
    np.testing.assert_allclose(by_action, truth, rtol=2e-3)
    chosen = _analytic.posterior_variance(TIMES, noise_square, 0.25, deviation)
    np.testing.assert_allclose(chosen, truth, rtol=2e-3)


def test_an_error_of_a_thousandth_ruins_the_wrong_identity_and_not_the_choice():
    noise_square, deviation, truth = gaussian_moments(0.25)
    off = 1.0 - 1e-3, 1.0 + 1e-3
    by_noise = _analytic.variance_from_noise(TIMES, noise_square * off[0])
    assert abs(by_noise[5] - truth[5]) > 1.0  # t = 0.9
    by_action = _analytic.variance_from_action(0.25, deviation * off[1])
    assert abs(by_action[0] / truth[0] - 1) > 0.02  # t = 0.02
    chosen = _analytic.posterior_variance(
        TIMES, noise_square * off[0], 0.25, deviation * off[1]
    )
    np.testing.assert_allclose(chosen, truth, rtol=0.01)


def test_the_variance_stays_between_nothing_and_the_best_linear_estimate():
    high = _analytic.posterior_variance(TIMES, -5.0, 0.25, -1.0)
    np.testing.assert_allclose(high, gaussian_moments(0.25)[2], rtol=2e-3)
    low = _analytic.posterior_variance(TIMES, 2.0, 0.25, 1.0)
    np.testing.assert_array_equal(low, 0.0)


def test_the_table_learns_the_variance_of_two_modes_from_batches():
    """Actions ±0.6 + N(0, 0.1²): far from Gaussian where the modes can be told apart."""
    num_batches, rows = 200, 256

    def exact(noisy, time):
        alpha, sigma = (scale[..., None] for scale in _vp.alpha_sigma(time))
        total = (0.1 * alpha) ** 2 + sigma**2
        side = jnp.tanh(alpha * 0.6 * noisy / total)
        spread = 0.01 * sigma**2 / total
        gain = alpha * 0.01 / total
        mean = gain * noisy + 0.6 * side * (1 - gain * alpha)
        between = (0.6 * (1 - gain * alpha)) ** 2 * (1 - side**2)
        return (noisy - alpha * mean) / sigma, mean, (spread + between)[..., 0]

    def step(carry, key):
        keys = jax.random.split(key, 4)
        time = jax.random.uniform(keys[0], (rows,), minval=1e-3)
        mode = jax.random.rademacher(keys[1], (rows, 1), jnp.float32)
        action = 0.6 * mode + 0.1 * jax.random.normal(keys[2], (rows, 1))
        noisy = _vp.diffuse(action, jax.random.normal(keys[3], (rows, 1)), time)
        noise, mean, truth = exact(noisy, time)
        moments = _analytic.update_moments(
            carry, action, noise, mean, time, rate=1 / num_batches
        )
        return moments, (time, truth)

    @jax.jit
    def run(key):
        start = _analytic.init_moments(40, 1)
        moments, seen = jax.lax.scan(step, start, jax.random.split(key, num_batches))
        centers = (jnp.arange(40) + 0.5) / 40
        return moments, _analytic.variance_at(moments, centers), seen

    moments, table, (time, truth) = run(jax.random.key(0))
    np.testing.assert_allclose(moments.action_square, 0.37, rtol=0.02)
    index = (np.asarray(time).ravel() * 40).astype(int)
    average = np.bincount(index, np.asarray(truth).ravel()) / np.bincount(index)
    np.testing.assert_allclose(table[2:], average[2:], rtol=0.12, atol=2e-3)
    linear = _analytic.linear_variance((np.arange(40) + 0.5) / 40, 0.37)
    assert np.max(linear / average) > 2  # a Gaussian of that variance is no substitute


def test_over_several_states_the_table_holds_the_mean_posterior_variance():
    """States with means ±0.8 and spreads 0.2 and 0.4: the law of total variance, with one
    mean and one variance for all of them."""
    rows, time = 40_000, 0.3
    side = np.where(np.arange(rows) % 2, 1.0, -1.0)
    mean, spread = 0.8 * side, np.where(side > 0, 0.4, 0.2)
    alpha, sigma = (float(x) for x in _vp.alpha_sigma(time))
    action = mean + spread * rng.standard_normal(rows)
    noisy = alpha * action + sigma * rng.standard_normal(rows)
    total = (alpha * spread) ** 2 + sigma**2
    noise = sigma * (noisy - alpha * mean) / total
    moments = _analytic.update_moments(
        _analytic.init_moments(1, 1),
        *(
            jnp.asarray(x, jnp.float32)[:, None]
            for x in (action, noise, (noisy - sigma * noise) / alpha)
        ),
        jnp.full(rows, time),
        rate=1.0,
    )
    truth = np.mean(spread**2 * sigma**2 / total)
    found = _analytic.posterior_variance(
        time, moments.noise_square[0], moments.action_square, moments.deviation[0]
    )
    np.testing.assert_allclose(found, truth, rtol=0.05)
    # Of a single Gaussian of the same overall variance it would be far more.
    linear = _analytic.linear_variance(time, moments.action_square)
    assert linear > 2 * truth


def test_no_bins_are_refused():
    with pytest.raises(ValueError, match="num_bins=0; expected at least 1"):
        _analytic.init_moments(0, 2)
