"""The schedule and the solver of the reverse diffusion, against Gaussians in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.policies import _vp

MEAN, STD = jnp.array([0.5, -0.3]), 0.5


def gaussian_noise(x, time):
    """Of N(m, s²): ``σ (a_t - α m) / (α² s² + σ²)``."""
    alpha, sigma = (scale[..., None] for scale in _vp.alpha_sigma(time))
    return sigma * (x - alpha * MEAN[None]) / ((alpha * STD) ** 2 + sigma**2)


def exact_end(start, end_time=_vp.END_TIME):
    """The ODE keeps quantiles: whitened at t = 1 is whitened at the end."""
    first, last = (_vp.alpha_sigma(time) for time in (1.0, end_time))
    spread = [jnp.sqrt((a * STD) ** 2 + s**2) for a, s in (first, last)]
    return last[0] * MEAN[None] + spread[1] / spread[0] * (
        start - first[0] * MEAN[None]
    )


@pytest.fixture(scope="module")
def start():
    return jax.random.normal(jax.random.key(0), (2000, 2))


@pytest.fixture(scope="module")
def errors(start):
    def error(steps):
        solve = jax.jit(lambda x: _vp.dpm_solver(gaussian_noise, x, num_steps=steps))
        end = solve(start)
        return float(jnp.abs(end - exact_end(start)).max())

    return {steps: error(steps) for steps in (60, 120)}


def test_the_schedule_preserves_variance_and_ends_in_noise():
    time = jnp.linspace(1e-3, 1.0, 200)
    alpha, sigma = _vp.alpha_sigma(time)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=1e-6)
    assert np.all(np.diff(alpha) < 0)
    # log α(1) = -19.9/4 - 0.05; small σ keeps its digits: σ² ≈ -2 log α.
    np.testing.assert_allclose(alpha[-1], np.exp(-5.025), rtol=1e-5)
    np.testing.assert_allclose(sigma[0] ** 2, 2 * (19.9e-6 / 4 + 5e-5), rtol=1e-3)


def test_the_predicted_action_inverts_the_diffusion():
    time = jnp.array([0.01, 0.3, 0.7])
    action, noise = jnp.ones((3, 2)), jnp.full((3, 2), -0.4)
    noisy = _vp.diffuse(action, noise, time)
    np.testing.assert_allclose(
        _vp.predicted_action(noisy, noise, time), action, rtol=1e-4
    )


def test_the_solver_is_of_second_order(errors):
    assert 3.0 < errors[60] / errors[120] < 5.5  # a first-order one: 2
    assert errors[120] < 3e-3


def test_fifteen_steps_are_usable_and_uniform_ones_are_not(start):
    close, uniform = (
        jax.jit(lambda x, p=power: _vp.dpm_solver(gaussian_noise, x, power=p))(start)
        for power in (2.0, 1.0)
    )
    assert np.abs(np.asarray(close.std(0)) - STD).max() < 0.03
    assert np.abs(np.asarray(uniform.std(0)) - STD).min() > 0.03


def test_the_bound_clips_and_leaves_the_inside_alone():
    start = jnp.array([[0.1, -0.2], [30.0, -30.0]])
    inside, outside = _vp.dpm_solver(gaussian_noise, start, bound=1.0)
    free = _vp.dpm_solver(gaussian_noise, start)
    np.testing.assert_allclose(inside, free[0], atol=1e-6)
    assert jnp.abs(free[1]).min() > 1.0
    np.testing.assert_array_equal(outside, [1.0, -1.0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_steps": 0}, "num_steps=0; expected at least 1"),
        ({"end_time": 0.0}, r"end_time=0.0; expected a time in \(0, 1\)"),
    ],
)
def test_bad_settings_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        _vp.dpm_solver(gaussian_noise, jnp.zeros((1, 2)), **options)
