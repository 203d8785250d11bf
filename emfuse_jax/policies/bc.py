"""Behaviour cloning: maximum likelihood of the recorded actions.

Its actor is soft actor-critic's, so a clone can be where reinforcement learning starts:
see `warm_start`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from emfuse_jax._settings import positive
from emfuse_jax.base import Metrics, Params, Policy, SpaceSpec, Transition
from emfuse_jax.policies._learning import decayed_adam, gradient_step
from emfuse_jax.policies._tanh_actor import tanh_actor
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

    def __post_init__(self) -> None:
        positive(self, "learning_rate")


class BcState(NamedTuple):
    """What `bc` trains; ``step`` counts the updates."""

    params: Params
    optimizer: optax.OptState
    step: jax.Array


def bc(config: BcConfig, spec: SpaceSpec) -> Policy:
    """Behaviour cloning with a tanh-normal policy.

    ``init(key) -> BcState``; ``update(key, state, batch: Transition)`` reads observations
    and actions only; ``act`` and ``energy = -log π(a|s)`` as for `sac`.

    Example:
        >>> policy = bc(BcConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> state = jax.eval_shape(policy.init, jax.random.key(0))
        >>> observation, action = jnp.zeros((7, 11)), jnp.zeros((7, 3))
        >>> jax.eval_shape(policy.energy, state.params, observation, action).shape
        (7,)
    """
    actor = tanh_actor(
        spec.action_size, config.hidden_sizes, log_std_bounds=config.log_std_bounds
    )
    optimizer = decayed_adam(config.learning_rate)

    def init(key: jax.Array) -> BcState:
        params = actor.init(key, jnp.zeros(spec.observation_size))
        return BcState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(
        key: jax.Array, state: BcState, batch: Transition
    ) -> tuple[BcState, Metrics]:
        del key

        def objective(params: Params) -> tuple[jax.Array, None]:
            energy = actor.energy(params, batch.observation, batch.action)
            return jnp.mean(energy), None

        params, new, loss, _ = gradient_step(
            optimizer, objective, state.params, state.optimizer
        )
        return BcState(params, new, state.step + 1), {"loss": loss}

    return Policy(init, update, actor.act, actor.energy)


def clone_config(config: SacConfig) -> BcConfig:
    """The cloning whose actor fits a soft actor-critic of ``config``.

    Example:
        >>> clone_config(SacConfig(hidden_sizes=(64, 64))).hidden_sizes
        (64, 64)
    """
    return BcConfig(
        hidden_sizes=config.hidden_sizes, log_std_bounds=config.log_std_bounds
    )


def warm_start(state: SacState, clone: Params) -> SacState:
    """Soft actor-critic's state that starts at a clone and has it as its prior.

    Example:
        >>> from emfuse_jax.policies.sac import sac
        >>> config, spec = SacConfig(hidden_sizes=(64, 64)), SpaceSpec(11, 3)
        >>> def start(key):
        ...     clone = bc(clone_config(config), spec).init(key).params
        ...     return warm_start(sac(config, spec).init(key), clone)
        >>> state = jax.eval_shape(start, jax.random.key(0))
        >>> jax.tree.structure(state.prior) == jax.tree.structure(state.params.actor)
        True
    """
    return state._replace(params=state.params._replace(actor=clone), prior=clone)
