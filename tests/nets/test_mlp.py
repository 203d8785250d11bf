"""Multi-layer perceptrons: the forward pass by hand and the initialisers' spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.nets import mlp as nets


def test_forward_pass_by_hand():
    network = nets.mlp(1, (2,), activation=jax.nn.relu)
    params = {
        "params": {
            "fc0": {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.array([0.5, 0.0])},
            "last_fc": {"kernel": jnp.array([[2.0], [3.0]]), "bias": jnp.array([-1.0])},
        }
    }
    # x = 1: relu(1.5, −1) = (1.5, 0) → 2 · 1.5 − 1; x = −2: relu(−1.5, 2) → 3 · 2 − 1.
    output = network.apply(params, jnp.array([[1.0], [-2.0]]))
    np.testing.assert_allclose(output, [[2.0], [5.0]])


def test_inputs_are_concatenated_and_batch_axes_free():
    network = nets.mlp(4, (8, 8))
    params = network.init(jax.random.key(0), jnp.zeros(3), jnp.zeros(2))
    a = jax.random.normal(jax.random.key(1), (5, 7, 3))
    b = jax.random.normal(jax.random.key(2), (5, 7, 2))
    output = network.apply(params, a, b)
    assert output.shape == (5, 7, 4)
    joined = network.apply(params, jnp.concatenate([a, b], -1))
    np.testing.assert_array_equal(output, joined)


def test_no_hidden_layers_is_a_linear_map():
    network = nets.mlp(2, ())
    params = network.init(jax.random.key(0), jnp.zeros(3))
    x = jax.random.normal(jax.random.key(1), (3,))
    np.testing.assert_allclose(
        network.apply(params, 2.0 * x), 2.0 * network.apply(params, x), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("init", "std"),
    [
        (nets.torch_uniform(), np.sqrt(1 / 3 / 64)),
        (nets.he_normal(), np.sqrt(2 / 64)),
        (nets.lecun_normal(), np.sqrt(1 / 64)),
        (nets.small_uniform(3e-3), 3e-3 / np.sqrt(3)),
    ],
    ids=["torch_uniform", "he_normal", "lecun_normal", "small_uniform"],
)
def test_initialiser_has_the_standard_deviation_of_its_name(init, std):
    network = nets.mlp(3, (512,), kernel_init=init)
    params = network.init(jax.random.key(0), jnp.zeros(64))["params"]["fc0"]
    # 32768 draws: the standard error of the estimate is about 0.5 %.
    np.testing.assert_allclose(params["kernel"].std(), std, rtol=0.02)
    np.testing.assert_array_equal(params["bias"], 0.0)


def test_output_initialiser_applies_to_the_last_layer_only():
    network = nets.mlp(3, (32,), output_init=nets.small_uniform(1e-3))
    params = network.init(jax.random.key(0), jnp.zeros(8))["params"]
    assert np.abs(params["last_fc"]["kernel"]).max() <= 1e-3
    assert np.abs(params["fc0"]["kernel"]).max() > 1e-2


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match=r"\(8, 0\)"):
        nets.mlp(0, (8,))
