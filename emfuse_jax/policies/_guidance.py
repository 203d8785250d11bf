"""The guidance network that guided diffusion policies share."""

import dataclasses

import jax

from emfuse_jax.base import Network, Transition
from emfuse_jax.data import normalizer as normalization
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.nets.denoiser import time_energy
from emfuse_jax.policies.diffusion import GuidedDiffusion


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """The network of the intermediate energy and how it is used.

    Attributes:
        hidden_sizes: of the energy network.
        learning_rate: Adam.
        decay_steps: as for the behaviour.
        average_rate: of the moving average of the weights, which guides.
        scale: the guidance's weight ``w``, 0 or more; 0 is the behaviour, 1 the exact
            target.
        rescale: keep the norm of the behaviour's noise while guiding; not exact, acts like
            a smaller scale.
    """

    hidden_sizes: tuple[int, ...] = (128, 128)
    learning_rate: float = 1e-3
    decay_steps: int | None = None
    average_rate: float = 0.005
    scale: float = 1.0
    rescale: bool = False

    def __post_init__(self) -> None:
        if not self.scale >= 0.0:
            raise ValueError(
                f"guidance scale={self.scale}; expected 0 or more: a negative one seeks "
                "the actions that the value calls bad"
            )
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(
                f"decay_steps={self.decay_steps}; expected at least 1, or None for a "
                "constant rate"
            )
        if not 0.0 < self.average_rate <= 1.0:
            raise ValueError(
                f"average_rate={self.average_rate}; expected a rate in (0, 1]; 1 guides "
                "with the last weights"
            )


def tilted_model(behaviour: GuidedDiffusion, energy: Network) -> GuidedDiffusion:
    """A behaviour with a guidance network; parameters have both as fields."""

    def noise(params, observation, noisy_action, time) -> jax.Array:
        return behaviour.noise(params.behaviour, observation, noisy_action, time)

    def guidance(params, observation, noisy_action, time) -> jax.Array:
        normal = normalization.apply(params.behaviour.normalizer, observation)
        return energy.apply(params.energy, noisy_action, time, normal)

    return GuidedDiffusion(noise, guidance)


def energy_network(config: GuidanceConfig) -> Network:
    """``E_t(s, a_t)``: low is good."""
    return time_energy(config.hidden_sizes)


def normalized(normalizer: Normalizer, batch: Transition) -> Transition:
    """The batch with normalised observations, as critics and guidance read it."""
    return batch._replace(
        observation=normalization.apply(normalizer, batch.observation),
        next_observation=normalization.apply(normalizer, batch.next_observation),
    )
