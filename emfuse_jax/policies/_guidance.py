"""The guidance network that guided diffusion policies share."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from emfuse_jax._settings import decays, positive, rates
from emfuse_jax.base import ActFn, Network, Params, SpaceSpec, Transition
from emfuse_jax.data import normalizer as normalization
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.nets.denoiser import time_energy
from emfuse_jax.policies._learning import decayed_adam, gradient_step, moving_average
from emfuse_jax.policies.diffusion import DiffusionConfig, GuidedDiffusion, guided_act


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
        if not 0.0 <= self.scale < float("inf"):
            raise ValueError(
                f"guidance scale={self.scale}; expected 0 or more: a negative one seeks "
                "the actions that the value calls bad"
            )
        positive(self, "learning_rate")
        decays(self, "decay_steps")
        rates(self, "average_rate")


class GuidanceState(NamedTuple):
    """Trained weights, their average, which guides, and the optimiser's state."""

    weights: Params
    average: Params
    optimizer: optax.OptState


def init_guidance(
    config: GuidanceConfig, key: jax.Array, spec: SpaceSpec
) -> GuidanceState:
    """Untrained guidance."""
    observation, action = (jnp.zeros(size) for size in spec)
    network = energy_network(config)
    weights = network.init(key, action, jnp.zeros(()), observation)
    average = jax.tree.map(jnp.copy, weights)
    return GuidanceState(weights, average, _optimizer(config).init(weights))


def guidance_step(
    config: GuidanceConfig,
    objective: Callable[[Params], jax.Array],
    state: GuidanceState,
    step: jax.Array,
) -> tuple[GuidanceState, jax.Array]:
    """One step down ``objective(weights) -> loss``, and the loss."""
    weights, optimizer, loss, _ = gradient_step(
        _optimizer(config),
        lambda weights: (objective(weights), None),
        state.weights,
        state.optimizer,
    )
    average = moving_average(weights, state.average, step, config.average_rate)
    return GuidanceState(weights, average, optimizer), loss


def _optimizer(config: GuidanceConfig) -> optax.GradientTransformation:
    return decayed_adam(config.learning_rate, config.decay_steps)


def tilted_model(behaviour: GuidedDiffusion, energy: Network) -> GuidedDiffusion:
    """A behaviour with a guidance network; parameters have both as fields."""

    def noise(params, observation, noisy_action, time) -> jax.Array:
        return behaviour.noise(params.behaviour, observation, noisy_action, time)

    def guidance(params, observation, noisy_action, time) -> jax.Array:
        normal = normalization.apply(params.behaviour.normalizer, observation)
        return energy.apply(params.energy, noisy_action, time, normal)

    return GuidedDiffusion(noise, guidance)


def tilted_act(
    model: GuidedDiffusion,
    behaviour: DiffusionConfig,
    guidance: GuidanceConfig,
    spec: SpaceSpec,
) -> ActFn:
    """Acting with a `tilted_model`, as both configs say."""
    return guided_act(
        model,
        spec.action_size,
        num_steps=behaviour.num_steps,
        scale=guidance.scale,
        rescale=guidance.rescale,
        bound=behaviour.bound,
    )


def energy_network(config: GuidanceConfig) -> Network:
    """``E_t(s, a_t)``: low is good."""
    return time_energy(config.hidden_sizes)


def normalized(normalizer: Normalizer, batch: Transition) -> Transition:
    """The batch with normalised observations, as critics and guidance read it."""
    return batch._replace(
        observation=normalization.apply(normalizer, batch.observation),
        next_observation=normalization.apply(normalizer, batch.next_observation),
    )
