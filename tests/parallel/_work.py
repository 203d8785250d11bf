"""Work to be placed on devices: a small energy learner, chains and a slice uncertainty.

The learner takes plain SGD steps and returns its gradients. Not Adam: it divides a
gradient's scale out, and so hides one that is N times too large.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import Learner
from emfuse_jax.dynamics import historical_slice_uncertainty
from emfuse_jax.loops import run_sampler
from emfuse_jax.samplers import ula

LEARNING_RATE = 0.1
PARAMS = {"w": np.linspace(0.5, 1.5, 3, dtype=np.float32)}
"""Of `chain` and `dispersion`."""


class EnergyState(NamedTuple):
    params: dict[str, jax.Array]
    steps: jax.Array


def energy(params, target):
    hidden = jnp.tanh(target @ params["first"])
    return jnp.squeeze(hidden @ params["last"], -1)


def energy_learner(size=3, negatives=4, learning_rate=LEARNING_RATE):
    """InfoNCE with uniform negatives and a normalised batch: both see every row."""

    def init(key):
        key_first, key_last = jax.random.split(key)
        params = {
            "first": jax.random.normal(key_first, (size, 8)),
            "last": jax.random.normal(key_last, (8, 1)),
        }
        return EnergyState(params, jnp.zeros((), jnp.int32))

    def loss(params, key, batch):
        batch = batch - jnp.mean(batch, axis=0, keepdims=True)
        drawn = jax.random.uniform(
            key, (batch.shape[0], negatives, size), minval=-2.0, maxval=2.0
        )
        energies = energy(params, jnp.concatenate([batch[:, None], drawn], axis=1))
        return jnp.mean(energies[:, 0] + jax.nn.logsumexp(-energies, axis=1))

    def update(key, state, batch):
        value, gradient = jax.value_and_grad(loss)(state.params, key, batch)
        params = jax.tree.map(
            lambda p, g: p - learning_rate * g, state.params, gradient
        )
        metrics = {"loss": value} | {f"d_{k}": g for k, g in gradient.items()}
        return EnergyState(params, state.steps + 1), metrics

    return Learner(init, update)


def train(learner, key, data, num_steps=3, state=None, start=0):
    """``num_steps`` updates on the same batch: the last state, and each step's metrics."""

    def step(state, number):
        return learner.update(jax.random.fold_in(key, number), state, data)

    state = learner.init(key) if state is None else state
    return jax.lax.scan(step, state, start + jnp.arange(num_steps))


def chain(params, key, position):
    """Langevin on a quadratic energy, any number of rows."""

    def quadratic(x):
        return 0.5 * jnp.sum(jnp.broadcast_to(params["w"], x.shape) * x * x, axis=-1)

    return run_sampler(key, ula(quadratic, 0.1), position, 4)[0].position


def dispersion(params, slices):
    """The slice uncertainty of predictions ``[slice, rows, dim]``: ``[rows]``, no key."""
    scaled = slices * jnp.broadcast_to(params["w"], slices.shape)
    return historical_slice_uncertainty(scaled)


def rows(num_rows=32, dim=3, seed=0):
    """Data of a run, the same in every process."""
    drawn = np.random.default_rng(seed).normal(1.0, size=(num_rows, dim))
    return drawn.astype(np.float32)


def slices(num_rows=32):
    """Five predictions of each row."""
    return np.stack([rows(num_rows, seed=seed) for seed in range(5)])
