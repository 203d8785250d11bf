"""What the benchmarks of the energy transition model share: one network in two libraries.

Published sizes: 4×200 ReLU units over ``[s, a, y]``, targets in the box of the data. The
data are random numbers of HalfCheetah's shapes; what a step costs does not depend on
their values.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._weights import untrained
from emfuse_jax.base import Dynamics, History, SpaceSpec
from emfuse_jax.data import make_dataset
from emfuse_jax.data.normalizer import apply as normalize
from emfuse_jax.dynamics import Batch, EtmConfig, etm, fit_scales

GROWTH = 2.5
"""Fresh weights hardly move a chain, which would make any two chains agree. Kernels this
much larger give slopes beyond the penalty's margin, so that every part of the loss acts."""

TOLERANCE = 1e-2
"""Relative. Rounding alone can flip a ReLU somewhere along a chain; a wrong term is
further off by orders of magnitude."""


class Problem(NamedTuple):
    """Ours and its inputs, and the same inputs as the peer takes them."""

    dynamics: Dynamics
    state: Any
    batch: Batch
    condition: np.ndarray
    """``[rows, obs + act]``, normalised."""
    positive: np.ndarray
    """``[rows, obs + 1]``, in the box."""


def problem(config: EtmConfig, spec: SpaceSpec, rows: int) -> Problem:
    """Random transitions, their scales and an energy with steep slopes."""
    rng = np.random.default_rng(0)
    observation = rng.normal(1.0, 2.0, (rows, spec.observation_size))
    change = rng.normal(0.0, 0.5, observation.shape)
    data = make_dataset(
        observations=observation,
        actions=np.tanh(rng.normal(size=(rows, spec.action_size))),
        rewards=rng.normal(1.0, 1.0, rows),
        next_observations=observation + change,
        terminals=np.zeros(rows, bool),
        timeouts=np.arange(1, rows + 1) % 1000 == 0,
    )
    data = jax.tree.map(jnp.asarray, data)
    scales = fit_scales(data, 1, anchor="current", target="box")
    dynamics = etm(config, spec)
    state = untrained(dynamics, scales)
    energy = jax.tree.map(
        lambda leaf: GROWTH * leaf if leaf.ndim > 1 else leaf, state.params.energy
    )
    state = state._replace(params=state.params._replace(energy=energy))
    history = History(
        data.observation[None], data.action[None], jnp.ones((1, rows), bool)
    )
    inputs = [
        normalize(scales.observation, data.observation),
        normalize(scales.action, data.action),
    ]
    change = data.next_observation - data.observation
    target = jnp.concatenate([change, data.reward[:, None]], axis=1)
    positive = target / jnp.broadcast_to(scales.target.scale, target.shape)
    return Problem(
        dynamics=dynamics,
        state=state,
        batch=Batch(history, data.reward, data.next_observation),
        condition=np.concatenate(inputs, axis=1),
        positive=np.array(positive),
    )


def peer_energy(given: Problem, hidden: tuple[int, ...]) -> Any:
    """The same network with the same weights in PyTorch."""
    from benchmarks._torch_etm import Energy

    peer = Energy(given.condition.shape[1], given.positive.shape[1], hidden)
    peer.load(given.state.params.energy)
    return peer


def relative(difference: Any, reference: Any) -> float:
    """Largest difference in units of the largest magnitude."""
    return float(np.max(np.abs(difference)) / np.max(np.abs(reference)))


def require_agreement(checks: dict[str, float]) -> dict[str, float]:
    """Refuses to compare the speed of different computations.

    Raises:
        RuntimeError: if a relative difference exceeds `TOLERANCE`.
    """
    for name, value in checks.items():
        if name.startswith("relative") and not value <= TOLERANCE:
            raise RuntimeError(
                f"{name} is {value:.3g}, more than {TOLERANCE}: ours and the peer do not "
                "compute the same thing, so their speeds cannot be compared"
            )
    return checks


def silent(config: EtmConfig) -> EtmConfig:
    """The same recipe without noise in its chains."""
    return dataclasses.replace(config, chain_noise=0.0)
