"""ETM: the one-step energy transition model.

Reference: Chen et al., "Offline transition modeling via contrastive energy learning",
ICML 2024.
"""

import dataclasses

import jax
import jax.numpy as jnp

from emfuse_jax.base import Dynamics, Network, SpaceSpec
from emfuse_jax.dynamics.contrastive import ContrastiveConfig, contrastive_dynamics


@dataclasses.dataclass(frozen=True, kw_only=True)
class EtmConfig(ContrastiveConfig):
    """A one-step energy transition model; the energy reads ``(s, a)`` themselves.

    Attributes:
        energy_sizes: hidden layers of the energy.
    """

    energy_sizes: tuple[int, ...] = (200, 200, 200, 200)


def etm(config: EtmConfig, spec: SpaceSpec) -> Dynamics:
    """The one-step energy transition model: ``init(key, scales)``, ``update(key, state,
    Batch)`` and ``model``, whose slice uncertainty is 0: it has one slice."""

    def concatenate(
        params: dict, anchor: jax.Array, action: jax.Array, lags: jax.Array
    ) -> jax.Array:
        del params, lags
        return jnp.concatenate([anchor, action[..., 0, :]], axis=-1)

    encoder = Network(lambda key, *example: {}, concatenate)
    size = spec.observation_size + spec.action_size
    return contrastive_dynamics(
        encoder, config, spec, num_lags=1, anchor="current", feature_size=size
    )
