"""Soft actor-critic with an ensemble of critics and a learned temperature.

Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018
(https://arxiv.org/abs/1812.05905). The losses are pure functions of arrays, one number
per example; `sac` puts them together into a `base.Policy`. Both clipped double
Q-learning (``num_critics=2``) and larger ensembles take the minimum over critics.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from emfuse_jax._settings import decays, discounts, positive, rates
from emfuse_jax.base import Metrics, Params, Policy, SpaceSpec, Transition
from emfuse_jax.nets.critic import q_ensemble
from emfuse_jax.policies._learning import decayed_adam, gradient_step
from emfuse_jax.policies._sac_losses import (
    actor_loss,
    critic_loss,
    critic_target,
    temperature_loss,
)
from emfuse_jax.policies._tanh_actor import of_actor, tanh_actor

__all__ = [
    "SacConfig",
    "SacParams",
    "SacParts",
    "SacState",
    "actor_loss",
    "critic_loss",
    "critic_target",
    "sac",
    "temperature_loss",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SacConfig:
    """Settings of `sac`; the defaults are those of the 2018 paper.

    Attributes:
        hidden_sizes: of the actor and of every critic.
        actor_learning_rate: Adam.
        actor_decay_steps: anneal the actor's rate to 0 along a cosine over this many
            updates; None keeps it constant.
        critic_learning_rate: Adam.
        temperature_learning_rate: Adam, on the log temperature.
        discount: γ.
        target_update_rate: τ of the target critics' moving average; 1 copies.
        target_entropy: in nats; None is minus the action size. 0 means 0. With a prior it
            is minus the target of ``KL(π ‖ prior)``.
        init_temperature: where the learned temperature starts.
        max_temperature: upper bound of the learned temperature (1.0 in the energy
            transition model's policies); None is no bound.
        fixed_temperature: use this temperature and learn none; None learns it.
        num_critics: size of the ensemble whose minimum is the target.
        log_std_bounds: clip of the actor's log standard deviation.
        backup_entropy: whether the target's value includes the entropy bonus.
        dispersion: λ of the pessimism ``mean_i Q_i - λ std_i Q_i`` over candidates of the
            next observation; batches then carry ``[candidate, batch, obs]`` of them.
    """

    hidden_sizes: tuple[int, ...] = (256, 256)
    actor_learning_rate: float = 3e-4
    actor_decay_steps: int | None = None
    critic_learning_rate: float = 3e-4
    temperature_learning_rate: float = 3e-4
    discount: float = 0.99
    target_update_rate: float = 0.005
    target_entropy: float | None = None
    init_temperature: float = 1.0
    max_temperature: float | None = None
    fixed_temperature: float | None = None
    num_critics: int = 2
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)
    backup_entropy: bool = True
    dispersion: float = 0.0

    def __post_init__(self) -> None:
        discounts(self)
        rates(self, "target_update_rate")
        decays(self, "actor_decay_steps")
        positive(
            self,
            "actor_learning_rate",
            "critic_learning_rate",
            "temperature_learning_rate",
            "init_temperature",
            "max_temperature",
        )
        if not self.dispersion >= 0.0:
            raise ValueError(
                f"dispersion={self.dispersion}; expected 0 or more: a negative one would "
                "reward what the model does not know"
            )
        if self.fixed_temperature is not None and not self.fixed_temperature >= 0.0:
            raise ValueError(
                f"fixed_temperature={self.fixed_temperature}; expected 0 or more, or "
                "None to learn it"
            )
        if self.target_entropy is not None and not math.isfinite(self.target_entropy):
            raise ValueError(
                f"target_entropy={self.target_entropy}; expected a number of nats, or "
                "None for minus the action size"
            )


class SacParams(NamedTuple):
    """What `sac` learns. ``critic`` leaves have a leading ``model`` axis."""

    actor: Params
    critic: Params
    log_temperature: Float[Array, ""]


class SacParts(NamedTuple):
    """Something for each of the fields of `SacParams`: an optimiser, or its state."""

    actor: Any
    critic: Any
    log_temperature: Any


class SacState(NamedTuple):
    """``step`` counts updates.

    ``prior`` holds the parameters of the prior's energy, which are not trained.
    """

    params: SacParams
    target_critic: Params
    optimizer_state: SacParts
    step: jax.Array
    prior: Params = ()


def sac(
    config: SacConfig,
    spec: SpaceSpec,
    *,
    prior_energy: Callable[[Params, jax.Array, jax.Array], jax.Array] | None = None,
) -> Policy:
    """Soft actor-critic.

    Its optimal policy is the Boltzmann law of the energy ``-Q / α``. With a prior it is that
    of the sum ``-Q / α + E_prior``: every log-probability below is then relative to the
    prior, and the entropy becomes ``-KL(π ‖ prior)``.

    ``init(key) -> SacState``; ``update(key, state, batch: Transition) -> (state,
    metrics)`` is one gradient step of the critics, the actor and the temperature on one
    batch ``[batch]``; ``act(params, key, observation, *, deterministic=False)`` samples
    or takes ``tanh(mean)`` (``key`` is then unused and may be None); ``energy(params,
    observation, action)`` is ``−log π(a|s)``, a normalised density and so comparable
    between policies.

    Args:
        config: see `SacConfig`.
        spec: sizes of the spaces; actions live in [−1, 1].
        prior_energy: ``(params, observation, action) -> -log p(action|observation)``, such
            as a behaviour clone's; its parameters are the state's ``prior``.

    Returns:
        A `Policy` whose state is a `SacState`.

    Example:
        >>> policy = sac(SacConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> state = jax.eval_shape(policy.init, jax.random.key(0))
        >>> action = jax.eval_shape(policy.act, state.params, jax.random.key(0), jnp.zeros((7, 11)))
        >>> action.shape
        (7, 3)
    """
    actor = tanh_actor(
        spec.action_size, config.hidden_sizes, log_std_bounds=config.log_std_bounds
    )
    critic = q_ensemble(config.num_critics, config.hidden_sizes)
    optimizers = SacParts(
        actor=decayed_adam(config.actor_learning_rate, config.actor_decay_steps),
        critic=decayed_adam(config.critic_learning_rate),
        log_temperature=decayed_adam(config.temperature_learning_rate),
    )

    def init(key: jax.Array) -> SacState:
        key_actor, key_critic = jax.random.split(key)
        observation = jnp.zeros(spec.observation_size)
        temperature = config.fixed_temperature
        if temperature is None:
            temperature = config.init_temperature
        params = SacParams(
            actor=actor.init(key_actor, observation),
            critic=critic.init(key_critic, observation, jnp.zeros(spec.action_size)),
            log_temperature=jnp.asarray(
                math.log(temperature) if temperature > 0.0 else -jnp.inf, jnp.float32
            ),
        )
        return SacState(
            params=params,
            target_critic=jax.tree.map(jnp.copy, params.critic),
            optimizer_state=SacParts(
                *(tx.init(p) for tx, p in zip(optimizers, params, strict=True))
            ),
            step=jnp.zeros((), jnp.int32),
        )

    def sample(
        params: Params, prior: Params, key: jax.Array, observation: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        action, log_prob = actor.sample(params, key, observation)
        if prior_energy is not None:
            log_prob = log_prob + prior_energy(prior, observation, action)
        return action, log_prob

    # `is None`, not truth: an honest 0 is a target.
    entropy = config.target_entropy
    entropy = -float(spec.action_size) if entropy is None else entropy
    parts = _Parts(sample, critic.apply, optimizers, entropy)

    def update(
        key: jax.Array, state: SacState, batch: Transition
    ) -> tuple[SacState, Metrics]:
        return _update(config, parts, key, state, batch)

    return Policy(init, update, *of_actor(actor))


class _Parts(NamedTuple):
    """What an update is made of.

    ``sample(actor_params, prior_params, key, observation) -> (action, log_prob)``, relative
    to the prior; ``critic(params, observation, action) -> [model, *batch]``.
    """

    sample: Callable[..., tuple[jax.Array, jax.Array]]
    critic: Callable[..., jax.Array]
    optimizers: SacParts
    target_entropy: float


def _update(
    config: SacConfig,
    parts: _Parts,
    key: jax.Array,
    state: SacState,
    batch: Transition,
) -> tuple[SacState, Metrics]:
    """Critics first, then the actor against the new ones (as in the paper)."""
    key_target, key_actor = jax.random.split(key)
    params, old = state.params, state.optimizer_state
    temperature = jnp.exp(params.log_temperature)
    target = _target(config, parts, key_target, state, batch)

    def critic_objective(critic: Params) -> tuple[jax.Array, jax.Array]:
        q = parts.critic(critic, batch.observation, batch.action)
        return jnp.mean(critic_loss(q, target)), q

    critic, critic_opt, loss_q, q = gradient_step(
        parts.optimizers.critic, critic_objective, params.critic, old.critic
    )

    def actor_objective(actor: Params) -> tuple[jax.Array, jax.Array]:
        action, log_prob = parts.sample(
            actor, state.prior, key_actor, batch.observation
        )
        q = parts.critic(critic, batch.observation, action)
        return jnp.mean(actor_loss(q, log_prob, temperature=temperature)), log_prob

    actor, actor_opt, loss_pi, log_prob = gradient_step(
        parts.optimizers.actor, actor_objective, params.actor, old.actor
    )
    log_temperature, log_opt = _temperature_step(config, parts, state, log_prob)
    new_state = SacState(
        params=SacParams(actor, critic, log_temperature),
        target_critic=optax.incremental_update(
            critic, state.target_critic, config.target_update_rate
        ),
        optimizer_state=SacParts(actor_opt, critic_opt, log_opt),
        step=state.step + 1,
        prior=state.prior,
    )
    return new_state, {
        "critic_loss": loss_q,
        "actor_loss": loss_pi,
        "q_mean": jnp.mean(q),
        "entropy": -jnp.mean(log_prob),
        "temperature": temperature,
    }


def _target(
    config: SacConfig,
    parts: _Parts,
    key: jax.Array,
    state: SacState,
    batch: Transition,
) -> Float[Array, "*batch"]:
    """Of the critics, over candidates of the next observation where the batch has them."""
    has_candidates = batch.next_observation.ndim > batch.observation.ndim
    if config.dispersion and not has_candidates:
        raise ValueError(
            f"dispersion={config.dispersion} needs candidates of the next observation, "
            f"[candidate, batch, obs]; the batch has {batch.next_observation.shape}: give "
            "model_based a candidates_fn, or dispersion=0"
        )
    draw = parts.sample
    if has_candidates:
        # One noise for all candidates: the policy's own would pass for dispersion.
        draw = jax.vmap(draw, in_axes=(None, None, None, 0))
    action, log_prob = draw(
        state.params.actor, state.prior, key, batch.next_observation
    )
    temperature = jnp.exp(state.params.log_temperature)
    return critic_target(
        batch.reward,
        batch.terminated,
        parts.critic(state.target_critic, batch.next_observation, action),
        log_prob,
        temperature=temperature if config.backup_entropy else 0.0,
        discount=config.discount,
        dispersion=config.dispersion if has_candidates else None,
    )


def _temperature_step(
    config: SacConfig, parts: _Parts, state: SacState, log_prob: jax.Array
) -> tuple[jax.Array, Any]:
    """The new log temperature and its optimiser's state; the old ones if it is fixed."""
    value, optimizer_state = (
        state.params.log_temperature,
        state.optimizer_state.log_temperature,
    )
    if config.fixed_temperature is not None:
        return value, optimizer_state

    def objective(value: jax.Array) -> tuple[jax.Array, None]:
        loss = temperature_loss(value, log_prob, target_entropy=parts.target_entropy)
        return jnp.mean(loss), None

    optimizer = parts.optimizers.log_temperature
    value, optimizer_state, _, _ = gradient_step(
        optimizer, objective, value, optimizer_state
    )
    if config.max_temperature is not None:
        value = jnp.minimum(value, math.log(config.max_temperature))
    return value, optimizer_state
