"""Branch rollouts of a policy inside a transition model, in one scan.

References: Janner et al., "When to trust your model: model-based policy optimization",
NeurIPS 2019 (branches from real states); penalties as in arXiv:2405.17031, section 4;
Kidambi et al., "MOReL: model-based offline reinforcement learning", NeurIPS 2020 (unknown
states that end the episode).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emfuse_jax.base import (
    History,
    Params,
    PolicyFn,
    Prediction,
    TerminatedFn,
    Transition,
    TransitionModel,
)


class Rollout(NamedTuple):
    """Imagined steps ``[time, batch, …]``; only those with ``valid`` happened.

    ``transition.reward`` is penalised; ``reward`` is the model's.
    """

    transition: Transition
    reward: Float[Array, "time batch"]
    uncertainty: Float[Array, "time batch"]
    valid: Bool[Array, "time batch"]


def push(history: History, observation: Float[Array, "*batch obs"]) -> History:
    """Ages the history by one step; lag 0 gets ``observation`` and, until the policy acts,
    a zero action.

    Example:
        >>> nothing = jnp.zeros((3, 1, 1))  # [lag, row, size]
        >>> history = History(nothing, nothing, jnp.zeros((3, 1), bool))
        >>> history = push(push(history, jnp.ones((1, 1))), 2 * jnp.ones((1, 1)))
        >>> history.observation[:, 0, 0].tolist()  # newest first
        [2.0, 1.0, 0.0]
        >>> history.valid[:, 0].tolist()
        [True, True, False]
    """

    def shift(leaf: jax.Array, newest: jax.Array) -> jax.Array:
        return jnp.concatenate([newest[None], leaf[:-1]])

    return History(
        shift(history.observation, observation),
        shift(history.action, jnp.zeros_like(history.action[0])),
        shift(history.valid, jnp.ones_like(history.valid[0])),
    )


def act_on(history: History, action: Float[Array, "*batch act"]) -> History:
    """The history with ``action`` at lag 0.

    Example:
        >>> nothing = jnp.zeros((2, 1, 1))  # [lag, row, size]
        >>> history = History(nothing, nothing, jnp.ones((2, 1), bool))
        >>> act_on(history, jnp.ones((1, 1))).action[:, 0, 0].tolist()
        [1.0, 0.0]
    """
    return history._replace(action=history.action.at[0].set(action))


def rollout(
    params: Params,
    key: jax.Array,
    model: TransitionModel,
    policy: PolicyFn,
    history: History,
    horizon: int,
    *,
    terminated_fn: TerminatedFn,
    penalty: float | jax.Array = 0.0,
    truncate_above: float | jax.Array | None = None,
    unknown: Literal["truncate", "terminate"] = "truncate",
    halt_value: float | jax.Array | None = None,
) -> Rollout:
    """Rolls ``policy`` from the newest state of ``history`` for up to ``horizon`` steps.

    A row ends for good when ``terminated_fn`` says so, and is cut (truncated: learners
    still bootstrap) at the horizon, where its prediction is not finite, or where its
    uncertainty exceeds ``truncate_above``. Ended rows are simulated on but not ``valid``.

    Args:
        params: the model's.
        key: consumed.
        model: any transition model.
        policy: ``(key, observation) -> action``.
        history: windows of real steps ``[lag, batch, …]``; the action at lag 0 is replaced
            by the policy's.
        horizon: static number of steps.
        terminated_fn: the environment's rule, raw units.
        penalty: subtracted from the reward per unit of uncertainty.
        truncate_above: uncertainty at which a row is cut.
        unknown: whether a row that is cut so is truncated, or terminated: then nothing
            of value lies beyond what the model knows, as in MOReL's absorbing state
            (pessimistic where rewards are positive).
        halt_value: terminate: what such a step is worth in all, in place of its reward,
            which comes from the same prediction; `lowest_return` is below every
            true value. Rows whose prediction
            is not finite then end so too: they are valid, and stay where they are. None
            keeps the reward.

    Returns:
        `Rollout` with leaves ``[time, batch, …]``.

    Raises:
        ValueError: if ``unknown`` is neither of the two, or a ``halt_value`` comes without
            ``unknown="terminate"``.

    Example:
        >>> from emfuse_jax.base import Prediction
        >>> def fall(params, key, history):  # a model that counts down, rewarded by its state
        ...     state, zero = history.observation[0], jnp.zeros(1)
        ...     return Prediction(state - 1.0, state[:, 0], zero, zero)
        >>> model = TransitionModel(predict=fall, energy=None, uncertainty=None)
        >>> history = History(
        ...     jnp.full((1, 1, 1), 3.0), jnp.zeros((1, 1, 1)), jnp.ones((1, 1), bool)
        ... )
        >>> steps = rollout(
        ...     None, jax.random.key(0), model, lambda key, state: 0.0 * state, history, 5,
        ...     terminated_fn=lambda state, action, following: following[:, 0] <= 0.0,
        ... )
        >>> steps.reward[:, 0].tolist(), steps.valid[:, 0].tolist()
        ([3.0, 2.0, 1.0, 0.0, -1.0], [True, True, True, False, False])
    """
    _check_unknown(unknown, halt_value)

    def step(carry: tuple[History, jax.Array], time: jax.Array):
        past, alive = carry
        key_policy, key_model = jax.random.split(jax.random.fold_in(key, time))
        observation = past.observation[0]
        action = policy(key_policy, observation)
        past = act_on(past, action)
        predicted, known = _finite(model.predict(params, key_model, past), observation)
        following, uncertainty = predicted.next_observation, predicted.uncertainty
        terminated = terminated_fn(observation, action, following)
        paid = predicted.reward - penalty * uncertainty
        end = _end(
            terminated, paid, uncertainty, known, truncate_above, unknown, halt_value
        )
        transition = Transition(
            observation=observation,
            action=action,
            reward=end.paid,
            next_observation=following,
            terminated=end.terminated,
            truncated=~end.terminated & (end.cut | (time == horizon - 1)),
        )
        out = Rollout(transition, predicted.reward, uncertainty, alive & end.known)
        return (push(past, following), alive & ~end.terminated & ~end.cut), out

    alive = jnp.ones(history.valid.shape[1:], bool)
    _, steps = jax.lax.scan(step, (history, alive), jnp.arange(horizon))
    return steps


def _check_unknown(unknown: str, halt_value: float | jax.Array | None) -> None:
    if unknown not in ("truncate", "terminate"):
        raise ValueError(f"unknown={unknown!r}; expected truncate or terminate")
    if halt_value is not None and unknown != "terminate":
        raise ValueError(
            f"halt_value={halt_value} needs unknown='terminate': a truncated row is worth "
            "what the learner says of its last state"
        )


class _End(NamedTuple):
    """Which rows of a step end and how, what they are paid, and which count; ``[batch]``."""

    terminated: jax.Array
    cut: jax.Array
    paid: jax.Array
    known: jax.Array


def _end(
    terminated: jax.Array,
    paid: jax.Array,
    uncertainty: jax.Array,
    known: jax.Array,
    truncate_above: float | jax.Array | None,
    unknown: str,
    halt_value: float | jax.Array | None,
) -> _End:
    """What becomes of rows where the model knows too little, or nothing finite."""
    cut = ~known
    beyond = jnp.zeros_like(cut)
    if truncate_above is not None:
        beyond = uncertainty > truncate_above
    if halt_value is not None:
        # What is not even finite is as unknown as can be.
        beyond, known = beyond | cut, jnp.ones_like(known)
        paid = jnp.where(beyond, halt_value, paid)
    if unknown == "truncate":
        return _End(terminated, cut | beyond, paid, known)
    return _End(terminated | beyond, cut, paid, known)


def _finite(
    predicted: Prediction, observation: Float[Array, "batch obs"]
) -> tuple[Prediction, Bool[Array, "batch"]]:
    """The prediction with rows that are not finite left where they were, and which are.

    An infinite uncertainty must not pass for none: its row is not finite either.
    """
    finite = (
        jnp.all(jnp.isfinite(predicted.next_observation), axis=-1)
        & jnp.isfinite(predicted.reward)
        & jnp.isfinite(predicted.uncertainty)
    )
    replaced = predicted._replace(
        next_observation=jnp.where(
            finite[:, None], predicted.next_observation, observation
        ),
        reward=jnp.where(finite, predicted.reward, 0.0),
        uncertainty=jnp.where(finite, predicted.uncertainty, 0.0),
    )
    return replaced, finite
