"""A fused policy in brax's own loop: the pool of two controllers that each know one thing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.energy import Gaussian, gaussian_energy, pool_energies, pool_gaussians
from emfuse_jax.samplers import etm_langevin

pytestmark = [
    pytest.mark.slow,
    # brax multiplies matrices by vectors of lower rank.
    pytest.mark.allow_rank_promotion,
    pytest.mark.filterwarnings("ignore"),
]
NUM_ENVS, NUM_STEPS = 8, 150


def controllers(observation):
    """What two experts say of the force, ``[model, env, 1]``: one balances, one centres."""
    x, angle, x_speed, angle_speed = (observation[..., i, None] for i in range(4))
    balance = 4.0 * angle + angle_speed
    centre = 2.0 * x + 2.0 * x_speed  # away first, so that the pole leans back
    mean = jnp.clip(jnp.stack([balance, centre]), -1.0, 1.0)
    variance = jnp.stack([jnp.full_like(x, 0.1), jnp.full_like(x, 0.3)])
    return mean, variance


def fused_action(observation, weights):
    mean, variance = controllers(observation)
    return pool_gaussians(mean, variance, weights).mean


@pytest.fixture(scope="module")
def play():
    """``weights -> (steps survived, last distance from the centre)`` of each environment,
    by brax's own interface."""
    envs = pytest.importorskip("brax.envs")
    env = envs.get_environment("inverted_pendulum", backend="generalized")

    @jax.jit
    def run(weights):
        keys = jax.random.split(jax.random.PRNGKey(0), NUM_ENVS)

        def step(carry, _):
            state, alive = carry
            state = jax.vmap(env.step)(state, fused_action(state.obs, weights))
            alive = alive & (state.done == 0)
            return (state, alive), alive

        state = jax.vmap(env.reset)(keys)
        (state, _), alive = jax.lax.scan(
            step, (state, jnp.ones(NUM_ENVS, bool)), None, NUM_STEPS
        )
        return alive.sum(0), jnp.abs(state.obs[:, 0])

    return run


def test_the_fused_policy_does_what_neither_of_its_members_does(play):
    steps, distance = play(jnp.array([0.5, 0.5]))
    assert (steps == NUM_STEPS).all(), steps
    assert distance.max() < 0.15, distance
    steps, distance = play(jnp.array([1.0, 0.0]))
    assert ((steps < NUM_STEPS) | (distance > 0.2)).all(), (steps, distance)
    steps, _ = play(jnp.array([0.0, 1.0]))
    assert steps.max() < NUM_STEPS // 2, steps


def test_descending_the_pooled_energy_is_the_same_policy():
    """The closed form above is what a chain on the sum of energies finds."""
    observation = 0.1 * jax.random.normal(jax.random.key(0), (5, 4))
    weights = jnp.array([0.5, 0.5])
    mean, variance = controllers(observation)

    def act(mean, variance):
        members = [
            gaussian_energy(Gaussian(m, v)) for m, v in zip(mean, variance, strict=True)
        ]
        chain = etm_langevin(
            pool_energies(members, weights), 200, first=0.03, last=1e-3, noise=0.0
        )

        def step(state, _):
            return chain.step(jax.random.key(0), state)[0], None

        return jax.lax.scan(step, chain.init(jnp.zeros(1)), None, 200)[0].position

    found = jax.jit(jax.vmap(act, in_axes=1))(mean, variance)
    np.testing.assert_allclose(found, fused_action(observation, weights), atol=2e-3)
