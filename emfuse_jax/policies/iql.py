"""Implicit Q-learning: critics that never ask for an action outside the data.

Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit Q-Learning", ICLR
2022 (https://arxiv.org/abs/2110.06169). The state's value is an upper expectile of the
recorded actions' values (equation 5), the critics bootstrap from it (equation 6), and the
policy is cloned with the weights ``exp(β (Q − V))`` (equation 7).

`iql_critics` are the critics alone, for policies that guide by them; `iql` adds the
policy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from emfuse_jax._settings import decays, discounts, positive, rates
from emfuse_jax.base import Metrics, Params, Policy, SpaceSpec, Transition
from emfuse_jax.nets.critic import q_ensemble
from emfuse_jax.nets.mlp import mlp
from emfuse_jax.policies._learning import decayed_adam, gradient_step
from emfuse_jax.policies._tanh_actor import of_actor, tanh_actor
from emfuse_jax.policies.sac import critic_loss, critic_target


def _check_expectile(expectile: float) -> None:
    if not 0.0 < expectile < 1.0:
        raise ValueError(
            f"expectile={expectile}; expected a number in (0, 1): 0.5 is the mean, 0.7 "
            "to 0.9 favour the better actions of the data"
        )


def _check_temperature(inverse_temperature: float, max_weight: float) -> None:
    if not inverse_temperature >= 0.0:
        raise ValueError(
            f"inverse_temperature={inverse_temperature}; expected 0 (cloning) or more: "
            "a negative one prefers the worse actions"
        )
    if not max_weight > 0.0:
        raise ValueError(f"max_weight={max_weight}; expected a positive bound")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IqlCriticsConfig:
    """Settings of `iql_critics`; the defaults are the paper's for locomotion, where it
    multiplies rewards by 1000 over the range of the episodes' returns.

    Attributes:
        expectile: τ of the state value, in (0, 1); 0.5 is the mean over the data's
            actions, 0.9 is for sparse rewards.
        discount: γ.
        hidden_sizes: of the state value and of every critic.
        learning_rate: Adam, for both.
        target_update_rate: of the target critics' moving average.
        num_critics: size of the ensemble whose minimum is the action's value.
    """

    expectile: float = 0.7
    discount: float = 0.99
    hidden_sizes: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-4
    target_update_rate: float = 0.005
    num_critics: int = 2

    def __post_init__(self) -> None:
        _check_expectile(self.expectile)
        discounts(self)
        rates(self, "target_update_rate")
        positive(self, "learning_rate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IqlConfig:
    """Settings of `iql`.

    Attributes:
        critics: the critics, which learn at the same time.
        hidden_sizes: of the actor.
        learning_rate: Adam, for the actor.
        decay_steps: anneal the actor's rate to 0 along a cosine over this many updates;
            None keeps it constant.
        inverse_temperature: β of the weights ``exp(β A)``; 0 clones the data.
        max_weight: the weights' upper bound.
        log_std_bounds: clip of the actor's log standard deviation.
    """

    critics: IqlCriticsConfig = IqlCriticsConfig()
    hidden_sizes: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-4
    decay_steps: int | None = None
    inverse_temperature: float = 3.0
    max_weight: float = 100.0
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)

    def __post_init__(self) -> None:
        _check_temperature(self.inverse_temperature, self.max_weight)
        positive(self, "learning_rate")
        decays(self, "decay_steps")


class IqlCriticParams(NamedTuple):
    """``q`` and ``target_q`` leaves have a leading ``model`` axis."""

    q: Params
    target_q: Params
    value: Params


class IqlCriticsState(NamedTuple):
    """State of `iql_critics`; the optimiser's states are those of ``q`` and ``value``."""

    params: IqlCriticParams
    q_optimizer: optax.OptState
    value_optimizer: optax.OptState
    step: jax.Array


class IqlCritics(NamedTuple):
    """A `base.Learner` with what it learns as functions of ``state.params``.

    ``q(params, observation, action) -> [*batch]`` is the minimum of the *target* critics,
    ``value(params, observation) -> [*batch]``.
    """

    init: Callable[..., IqlCriticsState]
    update: Callable[
        [jax.Array, IqlCriticsState, Transition], tuple[IqlCriticsState, Metrics]
    ]
    q: Callable[[IqlCriticParams, jax.Array, jax.Array], jax.Array]
    value: Callable[[IqlCriticParams, jax.Array], jax.Array]


class IqlParams(NamedTuple):
    """What `iql` learns."""

    actor: Params
    critics: IqlCriticParams


class IqlState(NamedTuple):
    """State of `iql`."""

    actor: Params
    actor_optimizer: optax.OptState
    critics: IqlCriticsState

    @property
    def params(self) -> IqlParams:
        """What ``act`` and ``energy`` take."""
        return IqlParams(self.actor, self.critics.params)

    @property
    def step(self) -> jax.Array:
        """Updates so far."""
        return self.critics.step


def expectile_loss(
    prediction: Float[Array, "*batch"],
    target: Float[Array, "*batch"],
    *,
    expectile: float,
) -> Float[Array, "*batch"]:
    """``|τ − 1(y < 0)| y²`` with ``y = target − prediction``; its mean is least at the
    τ-expectile of the targets.

    The sign matters: with ``y = prediction − target`` the same formula finds the
    (1 − τ)-expectile, a pessimistic value in place of an optimistic one.

    Args:
        prediction: ``V(s)``.
        target: ``Q(s, a)``; the caller stops its gradient.
        expectile: τ in (0, 1). 0.5 is half the squared error.

    Raises:
        ValueError: if τ is not in (0, 1).

    Example:
        >>> loss = expectile_loss(jnp.zeros(2), jnp.array([2.0, -2.0]), expectile=0.7)
        >>> [round(float(x), 2) for x in loss]
        [2.8, 1.2]
    """
    _check_expectile(expectile)
    excess = target - prediction
    return jnp.where(excess < 0.0, 1.0 - expectile, expectile) * jnp.square(excess)


def advantage_weight(
    advantage: Float[Array, "*batch"],
    *,
    inverse_temperature: float,
    max_weight: float = 100.0,
) -> Float[Array, "*batch"]:
    """``min(exp(β A), max_weight)``, without overflow before the clip (equation 7).

    Raises:
        ValueError: if β is negative or the bound is not positive.

    Example:
        >>> advantage_weight(jnp.array([0.0, 1e6]), inverse_temperature=3.0).tolist()
        [1.0, 100.0]
    """
    _check_temperature(inverse_temperature, max_weight)
    exponent = jnp.minimum(inverse_temperature * advantage, jnp.log(max_weight))
    return jnp.minimum(jnp.exp(exponent), max_weight)


def iql_critics(config: IqlCriticsConfig, spec: SpaceSpec) -> IqlCritics:
    """The critics of implicit Q-learning, without a policy.

    ``init(key) -> IqlCriticsState``; ``update(key, state, batch: Transition)`` is one
    step of the value, then of the critics against the new value (``key`` is unused: no
    action is sampled).

    Args:
        config: see `IqlCriticsConfig`.
        spec: sizes of the spaces.

    Example:
        >>> critics = iql_critics(IqlCriticsConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> state = jax.eval_shape(critics.init, jax.random.key(0))
        >>> value = jax.eval_shape(critics.value, state.params, jnp.zeros((7, 11)))
        >>> value.shape
        (7,)
    """
    critic = q_ensemble(config.num_critics, config.hidden_sizes)
    value_net = mlp(1, config.hidden_sizes)
    optimizer = decayed_adam(config.learning_rate)

    def init(key: jax.Array) -> IqlCriticsState:
        key_q, key_value = jax.random.split(key)
        observation = jnp.zeros(spec.observation_size)
        q_params = critic.init(key_q, observation, jnp.zeros(spec.action_size))
        value_params = value_net.init(key_value, observation)
        target = jax.tree.map(jnp.copy, q_params)
        return IqlCriticsState(
            params=IqlCriticParams(q_params, target, value_params),
            q_optimizer=optimizer.init(q_params),
            value_optimizer=optimizer.init(value_params),
            step=jnp.zeros((), jnp.int32),
        )

    def values(params: Params, observation: Any) -> jax.Array:
        return value_net.apply(params, observation)[..., 0]

    def q(params: IqlCriticParams, observation: Any, action: Any) -> jax.Array:
        return jnp.min(critic.apply(params.target_q, observation, action), axis=0)

    def value(params: IqlCriticParams, observation: Any) -> jax.Array:
        return values(params.value, observation)

    parts = _CriticParts(critic.apply, values, optimizer)

    def update(
        key: jax.Array, state: IqlCriticsState, batch: Transition
    ) -> tuple[IqlCriticsState, Metrics]:
        del key
        best = q(state.params, batch.observation, batch.action)
        return _update_critics(config, parts, best, state, batch)

    return IqlCritics(init, update, q, value)


class _CriticParts(NamedTuple):
    """``every(params, observation, action) -> [model, *batch]``; ``values(params,
    observation) -> [*batch]``."""

    every: Callable[..., jax.Array]
    values: Callable[..., jax.Array]
    optimizer: optax.GradientTransformation


def _update_critics(
    config: IqlCriticsConfig,
    parts: _CriticParts,
    best: Float[Array, "*batch"],
    state: IqlCriticsState,
    batch: Transition,
) -> tuple[IqlCriticsState, Metrics]:
    """The value towards an expectile of ``best``, then the critics towards the value."""
    params = state.params

    def value_objective(value: Params) -> tuple[jax.Array, jax.Array]:
        found = parts.values(value, batch.observation)
        loss = expectile_loss(found, best, expectile=config.expectile)
        return jnp.mean(loss), found

    new_value, value_optimizer, value_loss, found = gradient_step(
        parts.optimizer, value_objective, params.value, state.value_optimizer
    )
    target = critic_target(
        batch.reward,
        batch.terminated,
        parts.values(new_value, batch.next_observation)[None],
        jnp.zeros_like(batch.reward),
        temperature=0.0,
        discount=config.discount,
    )

    def q_objective(q: Params) -> tuple[jax.Array, None]:
        every = parts.every(q, batch.observation, batch.action)
        return jnp.mean(critic_loss(every, target)), None

    new_q, q_optimizer, q_loss, _ = gradient_step(
        parts.optimizer, q_objective, params.q, state.q_optimizer
    )
    new_target = optax.incremental_update(
        new_q, params.target_q, config.target_update_rate
    )
    new = IqlCriticsState(
        IqlCriticParams(new_q, new_target, new_value),
        q_optimizer,
        value_optimizer,
        state.step + 1,
    )
    return new, {
        "value_loss": value_loss,
        "critic_loss": q_loss,
        "value_mean": jnp.mean(found),
        "q_mean": jnp.mean(best),
        "advantage_std": jnp.std(best - found),
    }


def iql(config: IqlConfig, spec: SpaceSpec) -> Policy:
    """Implicit Q-learning with a tanh-normal policy cloned by advantage weights.

    ``init(key) -> IqlState``; ``update(key, state, batch: Transition)`` is one step of
    the critics and of the actor; ``act`` and ``energy = −log π(a|s)`` as for `sac`.

    Args:
        config: see `IqlConfig`.
        spec: sizes of the spaces; actions live in [−1, 1].

    Example:
        >>> policy = iql(IqlConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> state = jax.eval_shape(policy.init, jax.random.key(0))
        >>> action = jax.eval_shape(policy.act, state.params, jax.random.key(0), jnp.zeros((7, 11)))
        >>> action.shape
        (7, 3)
    """
    critics = iql_critics(config.critics, spec)
    actor = tanh_actor(
        spec.action_size, config.hidden_sizes, log_std_bounds=config.log_std_bounds
    )
    optimizer = decayed_adam(config.learning_rate, config.decay_steps)

    def init(key: jax.Array) -> IqlState:
        key_actor, key_critics = jax.random.split(key)
        params = actor.init(key_actor, jnp.zeros(spec.observation_size))
        return IqlState(params, optimizer.init(params), critics.init(key_critics))

    def update(
        key: jax.Array, state: IqlState, batch: Transition
    ) -> tuple[IqlState, Metrics]:
        learned, metrics = critics.update(key, state.critics, batch)
        # The value is the new one, the target critics those it was fitted to.
        advantage = critics.q(
            state.critics.params, batch.observation, batch.action
        ) - critics.value(learned.params, batch.observation)
        weight = advantage_weight(
            advantage,
            inverse_temperature=config.inverse_temperature,
            max_weight=config.max_weight,
        )

        def objective(params: Params) -> tuple[jax.Array, None]:
            energy = actor.energy(params, batch.observation, batch.action)
            return jnp.mean(weight * energy), None

        params, new, loss, _ = gradient_step(
            optimizer, objective, state.actor, state.actor_optimizer
        )
        metrics = {**metrics, "actor_loss": loss, "weight_mean": jnp.mean(weight)}
        return IqlState(params, new, learned), metrics

    return Policy(init, update, *of_actor(actor))
