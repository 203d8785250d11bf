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
    size = spec.observation_size + spec.action_size
    return contrastive_dynamics(
        state_action_encoder(),
        config,
        spec,
        num_lags=1,
        anchor="current",
        feature_size=size,
    )


def state_action_encoder() -> Network:
    """The encoder without parameters: the newest ``[s ‖ a]`` itself."""

    def concatenate(
        params: dict, anchor: jax.Array, action: jax.Array, lags: jax.Array
    ) -> jax.Array:
        del params, lags
        return jnp.concatenate([anchor, action[..., 0, :]], axis=-1)

    return Network(lambda key, *example: {}, concatenate)
