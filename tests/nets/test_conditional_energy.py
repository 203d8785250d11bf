import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.nets.energy import conditional_energy

CONDITION, DIM = 4, 3


@pytest.fixture(scope="module")
def network():
    return conditional_energy((8, 6))


@pytest.fixture(scope="module")
def params(network):
    example = jnp.zeros((1, CONDITION)), jnp.zeros((1, DIM))
    return network.init(jax.random.key(0), *example)


def inputs(rows=5):
    keys = jax.random.split(jax.random.key(1))
    return (
        jax.random.normal(keys[0], (rows, CONDITION)),
        jax.random.normal(keys[1], (rows, DIM)),
    )


def silu(x):
    return x / (1.0 + np.exp(-x))


def test_is_an_mlp_of_condition_and_target(network, params):
    condition, target = inputs()
    energy = network.energy(params, network.project(params, condition), target)
    assert energy.shape == (5,)
    weights = jax.tree.map(np.asarray, params["params"])
    kernel = np.concatenate(
        [weights["condition_layer"]["kernel"], weights["target_layer"]["kernel"]]
    )
    x = np.concatenate([condition, target], axis=1) @ kernel
    x = silu(x + weights["condition_layer"]["bias"])
    x = silu(x @ weights["hidden_0"]["kernel"] + weights["hidden_0"]["bias"])
    x = x @ weights["output"]["kernel"] + weights["output"]["bias"]
    np.testing.assert_allclose(energy, x[:, 0], rtol=1e-5, atol=1e-6)
    assert "bias" not in weights["target_layer"]  # one bias for the layer, not two


def test_one_projection_serves_many_targets(network, params):
    condition, target = inputs()
    projected = network.project(params, condition)
    candidates = jnp.stack([target, -target, target + 1.0])
    together = network.energy(params, projected[None], candidates)
    for index, candidate in enumerate(candidates):
        alone = network.energy(params, projected, candidate)
        np.testing.assert_allclose(together[index], alone, rtol=1e-5, atol=1e-6)
    assert not np.allclose(together[0], together[1])


def test_gradient_by_the_target_is_the_finite_difference(network, params):
    condition, target = inputs()
    with jax.enable_x64(True):
        wide, condition, target = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64),
            (params, condition, target),
        )

        def energy(y):
            return network.energy(wide, network.project(wide, condition), y)

        gradient = jax.grad(lambda y: energy(y).sum())(target)
        assert gradient.dtype == jnp.float64
        for dim in range(DIM):
            step = jnp.zeros((1, DIM)).at[0, dim].set(1e-6)
            slope = (energy(target + step) - energy(target - step)) / 2e-6
            np.testing.assert_allclose(gradient[:, dim], slope, rtol=1e-6, atol=1e-9)


def test_needs_a_hidden_layer():
    with pytest.raises(ValueError, match="at least one hidden size"):
        conditional_energy(())
    with pytest.raises(ValueError, match=r"\(8, 0\)"):
        conditional_energy((8, 0))
