"""A small energy learner that takes plain SGD steps.

Not Adam: it divides a gradient's scale out, and so hides one that is N times too large.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emfuse_jax.base import Learner

LEARNING_RATE = 0.1


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
        return EnergyState(params, state.steps + 1), {"loss": value}

    return Learner(init, update)


def train(learner, key, data, num_steps=3):
    """``num_steps`` updates on the same batch, compiled once."""

    def step(state, number):
        return learner.update(jax.random.fold_in(key, number), state, data)

    return jax.lax.scan(step, learner.init(key), jnp.arange(num_steps))
