"""Behaviour cloning: maximum likelihood of the recorded actions.

Its actor is soft actor-critic's, so a clone can be where reinforcement learning starts:
see `warm_start`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from emfuse_jax import distributions
from emfuse_jax.base import Metrics, Params, Policy, SpaceSpec, Transition
from emfuse_jax.nets.critic import gaussian_actor
from emfuse_jax.policies.sac import SacConfig, SacState


@dataclasses.dataclass(frozen=True, kw_only=True)
class BcConfig:
    """Settings of `bc`.

    Attributes:
        hidden_sizes: of the actor.
        learning_rate: Adam.
        log_std_bounds: clip of the actor's log standard deviation.
    """

    hidden_sizes: tuple[int, ...] = (256, 256)
    learning_rate: float = 1e-3
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)


class BcState(NamedTuple):
    params: Params
    optimizer: optax.OptState
    step: jax.Array


def bc(config: BcConfig, spec: SpaceSpec) -> Policy:
    """Behaviour cloning with a tanh-normal policy.

    ``init(key) -> BcState``; ``update(key, state, batch: Transition)`` reads observations
    and actions only; ``act`` and ``energy = -log π(a|s)`` as for `sac`.
    """
    actor = gaussian_actor(
        spec.action_size, config.hidden_sizes, log_std_bounds=config.log_std_bounds
    )
    optimizer = optax.adam(config.learning_rate)

    def init(key: jax.Array) -> BcState:
        params = actor.init(key, jnp.zeros(spec.observation_size))
        return BcState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def energy(params: Params, observation: jax.Array, action: jax.Array) -> jax.Array:
        mean, log_std = actor.apply(params, observation)
        return -distributions.log_prob(mean, log_std, action)

    def update(
        key: jax.Array, state: BcState, batch: Transition
    ) -> tuple[BcState, Metrics]:
        del key

        def objective(params: Params) -> jax.Array:
            return jnp.mean(energy(params, batch.observation, batch.action))

        loss, gradient = jax.value_and_grad(objective)(state.params)
        updates, new = optimizer.update(gradient, state.optimizer)
        params = optax.apply_updates(state.params, updates)
        return BcState(params, new, state.step + 1), {"loss": loss}

    def act(
        params: Params,
        key: jax.Array,
        observation: jax.Array,
        *,
        deterministic: bool = False,
    ) -> jax.Array:
        mean, log_std = actor.apply(params, observation)
        if deterministic:
            return distributions.mode(mean)
        return distributions.sample_and_log_prob(key, mean, log_std)[0]

    return Policy(init, update, act, energy)


def clone_config(config: SacConfig) -> BcConfig:
    """The cloning whose actor fits a soft actor-critic of ``config``."""
    return BcConfig(
        hidden_sizes=config.hidden_sizes, log_std_bounds=config.log_std_bounds
    )


def warm_start(state: SacState, clone: Params) -> SacState:
    """Soft actor-critic's state that starts at a clone and has it as its prior."""
    return state._replace(params=state.params._replace(actor=clone), prior=clone)
