"""The transformers: who may see whom, two halves that equal the whole, second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.nets import transformer
from emfuse_jax.nets.transformer import (
    TransformerConfig,
    energy_transformer,
    transformer_denoiser,
)

FRAMES, OBS, HORIZON, ACT, ROWS = 3, 2, 4, 2, 5
TINY = TransformerConfig(num_layers=1, features=8, num_heads=2)
SIZES = {"num_frames": FRAMES, "horizon": HORIZON, "config": TINY}


@pytest.fixture(scope="module")
def network():
    return energy_transformer(HORIZON * ACT, **SIZES)


@pytest.fixture(scope="module")
def inputs():
    key_observation, key_action = jax.random.split(jax.random.key(1))
    observation = jax.random.normal(key_observation, (ROWS, FRAMES * OBS))
    return observation, jax.random.normal(key_action, (ROWS, HORIZON * ACT))


@pytest.fixture(scope="module")
def params(network, inputs):
    return jax.jit(network.init)(jax.random.key(0), *inputs)


@pytest.fixture(scope="module")
def apply(network):
    return jax.jit(network.apply)


@pytest.fixture(scope="module")
def project(network):
    return jax.jit(network.project)


def test_the_halves_equal_the_whole_and_rows_do_not_meet(
    network, params, inputs, apply, project
):
    observation, action = inputs
    whole = apply(params, observation, action)
    assert whole.shape == (ROWS,)
    memory = project(params, observation)
    pair = jnp.stack([action, action[::-1]])  # two candidates per observation
    candidates = jax.jit(network.energy)(params, memory, pair)
    np.testing.assert_allclose(candidates[0], whole, rtol=1e-4, atol=1e-6)
    # The middle row's candidates are the same action, the others' are not.
    same = np.abs(candidates[1] - whole) < 1e-6
    assert same.tolist() == [False, False, True, False, False]


def test_frames_see_the_past_only(params, inputs, project):
    observation, _ = inputs
    memory = project(params, observation)
    later = observation.at[:, -OBS:].add(1.0)  # the newest frame
    changed = np.abs(project(params, later) - memory).max(axis=(0, 2))
    assert changed[:-1].max() < 1e-6 < 1e-2 < changed[-1]
    earlier = observation.at[:, :OBS].add(1.0)
    assert np.abs(project(params, earlier) - memory).max(axis=(0, 2))[-1] > 1e-3


def test_the_order_of_actions_matters(params, inputs, apply):
    observation, action = inputs
    chunk = action.reshape(ROWS, HORIZON, ACT)
    swapped = chunk[:, jnp.array([1, 0, 2, 3])].reshape(action.shape)
    difference = apply(params, observation, swapped) - apply(
        params, observation, action
    )
    assert float(jnp.min(jnp.abs(difference))) > 1e-6


def test_the_energy_is_twice_differentiable(network, params, inputs):
    """The parameters' gradient of a function of the action's gradient, by differences."""
    observation, action = (x[:1] for x in inputs)

    def slope(scale):
        scaled = jax.tree.map(lambda leaf: scale * leaf, params)
        grad = jax.grad(lambda a: jnp.sum(network.apply(scaled, observation, a)))
        return jnp.sum(jnp.square(grad(action)))

    value_and_mixed = jax.jit(jax.value_and_grad(slope))
    slopes = [value_and_mixed(scale)[0] for scale in (0.99, 1.01)]
    mixed = value_and_mixed(1.0)[1]
    np.testing.assert_allclose(mixed, (slopes[1] - slopes[0]) / 0.02, rtol=2e-2)
    assert abs(float(mixed)) > 1e-4


def test_the_denoiser_reads_the_time_and_the_observation():
    network = transformer_denoiser(HORIZON * ACT, **SIZES)
    noisy = jax.random.normal(jax.random.key(2), (2, HORIZON * ACT))
    time, observation = jnp.array([0.1, 0.5]), jnp.ones((2, FRAMES * OBS))
    apply = jax.jit(network.apply)
    params = jax.jit(network.init)(jax.random.key(0), noisy, time, observation)
    noise = apply(params, noisy, time, observation)
    assert noise.shape == noisy.shape
    for other in (
        apply(params, noisy, time + 0.01, observation),
        apply(params, noisy, time, 2 * observation),
    ):
        assert float(jnp.max(jnp.abs(other - noise))) > 1e-4


def test_sinusoids_are_those_of_the_formula():
    value = transformer.sinusoids(jnp.array([3.0]), 8)[0]
    rate = 10_000.0 ** -(np.arange(4) / 4)
    expected = np.concatenate([np.sin(3 * rate), np.cos(3 * rate)])
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: energy_transformer(7, horizon=4), "horizon=4 must divide"),
        (lambda: TransformerConfig(features=10, num_heads=4), "multiple of num_heads"),
        (lambda: TransformerConfig(num_layers=0), "num_layers=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_observations_that_are_no_stack_of_frames_are_refused(network, params):
    with pytest.raises(ValueError, match="num_frames=3"):
        network.project(params, jnp.zeros((1, 7)))
