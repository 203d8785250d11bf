"""Diffusion cloning learns a conditional law; guidance tilts one exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import SpaceSpec, Transition
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.loops import fit
from emfuse_jax.nets.denoiser import PAPER_DENOISER, DenoiserConfig, denoiser
from emfuse_jax.policies import _vp
from emfuse_jax.policies.diffusion import (
    DiffusionConfig,
    GuidedDiffusion,
    diffusion,
    diffusion_model,
    draw_times,
    guided_act,
    guided_noise,
)

SPEC = SpaceSpec(2, 1)
CONFIG = DiffusionConfig(
    network=DenoiserConfig(hidden_sizes=(48, 48), time_features=8), learning_rate=4e-3
)
OBSERVATION = jnp.array([[0.5, 3.0], [-0.5, 3.0]])
NORMALIZER = Normalizer(jnp.array([0.0, 3.0]), jnp.array([0.5, 1.0]))


def batch_of(key, rows=256):
    """Modes at ±0.7; three of four actions have the sign of the first observation."""
    keys = jax.random.split(key, 4)
    observation = jax.random.uniform(keys[0], (rows, 2), minval=-1.0)
    observation = observation + jnp.array([[0.0, 3.0]])
    likely = jnp.where(observation[:, 0] > 0, 0.75, 0.25)
    mode = jnp.where(jax.random.uniform(keys[1], (rows,)) < likely, 0.7, -0.7)
    action = (mode + 0.1 * jax.random.normal(keys[2], (rows,)))[:, None]
    none = jnp.zeros(rows)
    return Transition(observation, action, none, observation, none > 0, none > 0)


@pytest.fixture(scope="module")
def policy():
    return diffusion(CONFIG, SPEC)


@pytest.fixture(scope="module")
def trained(policy):
    @jax.jit
    def train(key):
        state = policy.init(key, normalizer=NORMALIZER)
        return fit(key, policy, state, lambda k, _: batch_of(k), 1500, chunk=1500)[0]

    return train(jax.random.key(0)).params


@pytest.fixture(scope="module")
def act(policy):
    return jax.jit(policy.act, static_argnames="deterministic")


@pytest.mark.allow_key_reuse
def test_both_modes_are_sampled_as_often_as_they_were_recorded(act, trained):
    rows = jnp.repeat(OBSERVATION, 2000, axis=0)
    action = np.asarray(act(trained, jax.random.key(1), rows)).reshape(2, -1)
    share = np.mean(action > 0, axis=1)
    np.testing.assert_allclose(share, [0.75, 0.25], atol=0.08)
    # A Gaussian of the same mean and spread has a tenth of its draws in the gap.
    assert np.mean(np.abs(action) < 0.2) < 0.05
    assert np.abs(action).max() <= 1.0


@pytest.mark.allow_key_reuse
def test_one_row_without_a_batch_axis_and_no_key_for_a_deterministic_one(
    act, policy, trained
):
    one = act(trained, jax.random.key(1), OBSERVATION[0])
    assert one.shape == (1,)
    assert jax.eval_shape(act, trained, jax.random.key(1), OBSERVATION[:1]).shape == (
        1,
        1,
    )
    still = policy.act(trained, None, OBSERVATION[0], deterministic=True)
    np.testing.assert_allclose(
        still, policy.act(trained, None, OBSERVATION[0], deterministic=True)
    )
    with pytest.raises(ValueError, match=r"key=None"):
        policy.act(trained, None, OBSERVATION)


def test_velocity_gives_the_noise_that_all_noise_is(trained):
    """At t = 1 whatever the network says, ``ε ≈ a_t``; a noise network may say anything."""
    rows = jnp.array([[0.3], [-1.4]])
    told = {}
    for kind in ("velocity", "noise"):
        config = DiffusionConfig(network=CONFIG.network, prediction=kind)
        noise = jax.jit(diffusion_model(config, SPEC).noise)
        told[kind] = noise(trained, OBSERVATION, rows, jnp.ones(2))
    assert jnp.abs(told["velocity"] - rows).max() < 0.02
    assert jnp.abs(told["noise"] - rows).max() > 0.1


def test_times_are_uniform_and_stratified():
    time = np.sort(draw_times(jax.random.key(0), (100,), 1e-3))
    grid = 1e-3 + (1 - 1e-3) * np.arange(101) / 100
    assert np.all((time >= grid[:-1] - 1e-6) & (time <= grid[1:] + 1e-6))
    assert draw_times(jax.random.key(0), (), 1e-3).shape == ()


def gaussian_model(slope):
    """N(0, 0.5²) tilted by the energy ``-slope · a``, whose ``E_t`` is known."""

    def noise(params, observation, x, time):
        alpha, sigma = (scale[..., None] for scale in _vp.alpha_sigma(time))
        return sigma * x / ((0.5 * alpha) ** 2 + sigma**2)

    def guidance(params, observation, x, time):
        alpha, sigma = _vp.alpha_sigma(time)
        gain = 0.25 * alpha / ((0.5 * alpha) ** 2 + sigma**2)
        return -slope * gain * x[..., 0]

    return GuidedDiffusion(noise, guidance)


@pytest.mark.allow_key_reuse
def test_guidance_shifts_a_gaussian_by_its_slope_and_its_sign_is_that_of_energies():
    rows, key = jnp.zeros((4000, 2)), jax.random.key(2)
    means, stds = {}, {}
    for scale, rescale in ((0.0, False), (1.0, False), (2.0, False), (1.0, True)):
        act = guided_act(
            gaussian_model(1.2),
            1,
            num_steps=60,
            scale=scale,
            rescale=rescale,
            bound=None,
        )
        action = np.asarray(jax.jit(act)((), key, rows))
        means[scale, rescale], stds[scale, rescale] = action.mean(), action.std()
    error = 4 * 0.5 / np.sqrt(4000)
    # exp(1.2 a) on N(0, 0.25) moves the mean by 0.25 · 1.2 and leaves the spread.
    assert abs(means[0.0, False]) < error
    assert abs(means[1.0, False] - 0.3) < error
    assert abs(means[2.0, False] - 0.6) < error
    assert abs(stds[1.0, False] - 0.5) < 0.03
    # Keeping the norm is a stabiliser, not exact: some other policy altogether.
    assert abs(means[1.0, True] - 0.3) > 4 * error


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: guided_act(gaussian_model(1.0), 1, scale=-0.5),
            "scale=-0.5.*0 or more",
        ),
        (
            lambda: guided_noise(lambda x, t: x, lambda x, t: x, scale=float("nan")),
            "scale=nan",
        ),
        (lambda: guided_act(gaussian_model(1.0), 1, num_steps=0), "num_steps=0"),
        (lambda: DiffusionConfig(num_steps=0), "num_steps=0; expected at least 1"),
        (lambda: DiffusionConfig(min_time=0.0), "min_time=0.0"),
        (lambda: DiffusionConfig(average_rate=0.0), "average_rate=0.0"),
        (lambda: DiffusionConfig(prediction="score"), "prediction='score'"),
        (lambda: DenoiserConfig(time_features=3), "time_features=3"),
        (lambda: DenoiserConfig(kind="resnet"), "kind='resnet'"),
    ],
)
@pytest.mark.untyped
def test_bad_settings_are_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_the_published_network_has_its_published_widths():
    network = denoiser(3, PAPER_DENOISER)
    inputs = jnp.zeros((2, 3)), jnp.zeros(2), jnp.zeros((2, 5))
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    assert jax.eval_shape(network.apply, params, *inputs).shape == (2, 3)
    assert params["params"]["last_fc"]["kernel"].shape == (1024, 3)
