"""Our energies, samplers and losses inside loops that other libraries own.

Each test is a program that a user of that library might write; what it asserts is a law
that a wrong sign, shape or scale would break.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from emfuse_jax.energy import Gaussian, gaussian_energy, pool_energies, pool_gaussians
from emfuse_jax.losses import (
    gaussian_mixture_log_prob,
    gaussian_mixture_proposal,
    ranking_nce,
)
from emfuse_jax.samplers import ula

MEANS = jnp.array([[-1.0, 0.0], [1.0, 2.0]])
VARIANCES = jnp.array([[1.0, 0.5], [0.25, 1.0]])
WEIGHTS = jnp.array([0.3, 0.7])


@pytest.fixture(scope="module")
def fused():
    members = [
        gaussian_energy(Gaussian(mean, variance))
        for mean, variance in zip(MEANS, VARIANCES, strict=True)
    ]
    return pool_energies(members, WEIGHTS)


@pytest.fixture(scope="module")
def exact():
    return pool_gaussians(MEANS, VARIANCES, WEIGHTS)


@pytest.mark.allow_rank_promotion
@pytest.mark.allow_key_reuse
def test_a_fused_energy_is_a_blackjax_log_density(fused, exact):
    """blackjax's own loop, vmapped over chains as its users do."""
    import blackjax

    algorithm = blackjax.hmc(
        lambda y: -fused(y),
        step_size=0.3,
        inverse_mass_matrix=jnp.ones(2),
        num_integration_steps=4,
    )

    @jax.jit
    @jax.vmap
    def chain(key):
        def step(state, key):
            state, _ = algorithm.step(key, state)
            return state, state.position

        keys = jax.random.split(key, 150)
        return jax.lax.scan(step, algorithm.init(jnp.zeros(2)), keys)[1][50:]

    draws = chain(jax.random.split(jax.random.key(0), 64)).reshape(-1, 2)
    # At least a tenth of the draws count; four standard errors of that.
    error = 4 * np.sqrt(exact.variance / (0.1 * len(draws)))
    assert (np.abs(draws.mean(0) - exact.mean) < error).all()
    assert (np.abs(MEANS - exact.mean).max(0) > 2 * error).all()
    np.testing.assert_allclose(draws.var(0), exact.variance, rtol=0.2)


def test_an_energy_trains_in_a_plain_optax_loop():
    """No learner of ours: an energy ``½ p (y - m)²``, ranking NCE, and optax."""
    mean, precision = 0.7, 4.0
    optimizer = optax.adam(0.05)
    scales = jnp.array([1.0, 3.0])

    def loss(params, key):
        key_data, key_negative = jax.random.split(key)
        data = mean + jax.random.normal(key_data, (256, 1)) / jnp.sqrt(precision)
        shape = jnp.zeros((256, 1))
        negative, negative_log_q = gaussian_mixture_proposal(
            key_negative, shape, shape + 1.0, scales, 16
        )
        positive_log_q = gaussian_mixture_log_prob(data, shape, shape + 1.0, scales)

        def energy(y):
            squared = jnp.square(y - params["mean"])
            return 0.5 * jnp.exp(params["log_precision"]) * squared[..., 0]

        return jnp.mean(
            ranking_nce(energy(data), energy(negative), positive_log_q, negative_log_q)
        )

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            gradient = jax.grad(loss)(params, key)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), params

        keys = jax.random.split(jax.random.key(0), 400)
        (_, _), path = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return jax.tree.map(lambda leaf: leaf[-100:].mean(0), path)

    start = {"mean": jnp.zeros(()), "log_precision": jnp.zeros(())}
    found = train(start)
    assert float(found["mean"]) == pytest.approx(mean, abs=0.05)
    assert float(jnp.exp(found["log_precision"])) == pytest.approx(precision, rel=0.15)


@pytest.mark.allow_rank_promotion
def test_a_flax_nnx_module_is_an_energy_function():
    """Nothing to register: a bound module is a function of positions."""
    from flax import nnx

    class Bowl(nnx.Module):
        def __init__(self, center, rngs):
            self.center = nnx.Param(center)
            self.scale = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, y):
            return 0.5 * jnp.sum(jnp.square(self.scale(y - self.center[...])), axis=-1)

    def bowl(center, seed):
        module = Bowl(jnp.asarray(center), nnx.Rngs(seed))
        module.scale.kernel[...] = 2.0 * jnp.eye(2)  # precision 4
        return module

    graph, left = nnx.split(bowl([-1.0, 0.0], 0))
    _, right = nnx.split(bowl([1.0, 0.0], 1))

    @jax.jit
    def sample(params, key):
        members = [nnx.merge(graph, state) for state in params]
        chain = ula(pool_energies(members, jnp.array([0.5, 0.5])), 0.05)

        def step(state, key):
            return chain.step(key, state)[0], None

        keys = jax.random.split(key, 100)
        return jax.lax.scan(step, chain.init(jnp.zeros((500, 2))), keys)[0].position

    position = sample((left, right), jax.random.key(0))
    variance = 0.25 / (1 - 0.05 * 4 / 2)  # ula's own law at step 0.05
    assert np.abs(position.mean(0)).max() < 4 * np.sqrt(variance / 500)
    np.testing.assert_allclose(position.var(0), variance, rtol=4 * np.sqrt(2 / 500))

    moved = sample((right, right), jax.random.key(0))
    assert float(moved[:, 0].mean()) == pytest.approx(1.0, abs=0.1)

    gradient = jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(position)))(
        left
    )
    np.testing.assert_allclose(
        gradient.center[...], -4 * (position - left.center[...]).sum(0), rtol=1e-3
    )


@pytest.mark.untyped  # a symbolic dimension is no int
def test_a_fused_sampler_is_exported_with_a_symbolic_batch(fused, exact):
    """Bytes that sample any number of rows; keys cross as their data."""

    def sample(key_data, position):
        chain = ula(fused, 0.05)
        key = jax.random.wrap_key_data(key_data)

        def step(state, index):
            return chain.step(jax.random.fold_in(key, index), state)[0], None

        return jax.lax.scan(step, chain.init(position), jnp.arange(100))[0].position

    (rows,) = export.symbolic_shape("rows")
    exported = export.export(jax.jit(sample))(
        jax.ShapeDtypeStruct((2,), jnp.uint32),
        jax.ShapeDtypeStruct((rows, 2), jnp.float32),
    )
    assert str(exported.out_avals[0].shape) == "(rows, 2)"
    exported = export.deserialize(exported.serialize())
    for size in (3, 1000):
        start = jnp.zeros((size, 2))
        key_data = jax.random.key_data(jax.random.key(size))
        position = exported.call(key_data, start)
        np.testing.assert_allclose(position, sample(key_data, start), atol=1e-5)
    biased = exact.variance / (1 - 0.05 / (2 * exact.variance))
    assert (np.abs(position.mean(0) - exact.mean) < 4 * np.sqrt(biased / 1000)).all()
