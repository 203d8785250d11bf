"""Offline model-based learning as one `base.Learner`: rollouts, model buffer and updates
together.

One ``update`` branches rollouts off real states, stores what happened in the model buffer
and makes ``updates_per_rollout`` gradient steps on a mix of real and imagined rows: one
compiled program, from which metrics leave once. The dynamics come in as a function, so any
transition model serves.

Reference: Yu et al., "MOPO: model-based offline policy optimization", NeurIPS 2020.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emfuse_jax.base import (
    Learner,
    Metrics,
    Policy,
    PolicyFn,
    SpaceSpec,
    State,
    Transition,
)
from emfuse_jax.data.buffer import num_stored, ring_buffer
from emfuse_jax.data.dataset import Dataset, gather_transition
from emfuse_jax.numerics import masked_mean
from emfuse_jax.policies.online import example_transition


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelBasedConfig:
    """Settings of `model_based`.

    Attributes:
        rollout_rows: branches per refresh of the model buffer.
        horizon: steps of a branch.
        retain: refreshes that the model buffer holds.
        updates_per_rollout: gradient steps between refreshes.
        batch_size: rows per gradient step.
        real_ratio: part of the batch that comes from the data.
    """

    rollout_rows: int = 10_000
    horizon: int = 5
    retain: int = 5
    updates_per_rollout: int = 1000
    batch_size: int = 256
    real_ratio: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.real_ratio < 1.0:
            raise ValueError(f"real_ratio={self.real_ratio} must be in [0, 1)")
        for name in (
            "rollout_rows",
            "horizon",
            "retain",
            "updates_per_rollout",
            "batch_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_real == self.batch_size:
            raise ValueError(
                f"real_ratio={self.real_ratio} of batch_size={self.batch_size} leaves no "
                "imagined row; lower it, or train on the data alone"
            )

    @property
    def num_real(self) -> int:
        """Recorded rows of a batch."""
        return round(self.real_ratio * self.batch_size)


class ModelBasedState(NamedTuple):
    """``policy`` is the policy's state, ``replay`` the model buffer's."""

    policy: State
    replay: State

    @property
    def params(self) -> Any:
        """The policy's parameters, as its ``act`` takes them."""
        return self.policy.params


class Imagined(NamedTuple):
    """What a rollout function returns, leaves ``[rows, …]``; see `dynamics.Rollout`."""

    transition: Transition
    valid: jax.Array
    uncertainty: jax.Array


RolloutFn = Callable[[Any, jax.Array, PolicyFn, Dataset], Imagined]
"""``(model_params, key, policy, dataset) -> Imagined``."""


CandidatesFn = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
"""``(model_params, key, observation, action) -> next_observation [candidate, rows, obs]``."""


def model_based(
    policy: Policy,
    rollout_fn: RolloutFn,
    config: ModelBasedConfig,
    spec: SpaceSpec,
    *,
    candidates_fn: CandidatesFn | None = None,
) -> Learner:
    """Trains ``policy`` on rollouts of a model.

    ``init(key) -> ModelBasedState``; ``update(key, state, (model_params, dataset)) ->
    (state, metrics)`` is one refresh and its gradient steps, so under `loops.fit` use
    chunks of one.

    Args:
        policy: any off-policy learner that acts.
        rollout_fn: branches ``config.rollout_rows`` rollouts of ``config.horizon`` steps.
        config: see `ModelBasedConfig`.
        spec: sizes of the spaces.
        candidates_fn: draws several next observations for every imagined row of a batch,
            for policies whose target depends on how their values differ. A recorded row
            is its only candidate.

    Example:
        >>> from emfuse_jax.policies.sac import SacConfig, sac
        >>> spec = SpaceSpec(observation_size=2, action_size=1)
        >>> def rollout_fn(params, key, policy, history):
        ...     raise NotImplementedError  # `dynamics.rollout` with a model and its rules
        >>> learner = model_based(sac(SacConfig(), spec), rollout_fn, ModelBasedConfig(), spec)
        >>> state = jax.eval_shape(learner.init, jax.random.key(0))
    """
    capacity = config.rollout_rows * config.horizon * config.retain
    buffer = ring_buffer(capacity, config.batch_size - config.num_real)
    mixed_batch = _mixed_batch(buffer.sample, candidates_fn, config.num_real)

    def init(key: jax.Array) -> ModelBasedState:
        return ModelBasedState(policy.init(key), buffer.init(example_transition(spec)))

    def update(
        key: jax.Array, state: ModelBasedState, data: tuple[Any, Dataset]
    ) -> tuple[ModelBasedState, Metrics]:
        model_params, dataset = data
        key_rollout, key_learn = jax.random.split(key)

        def act(key: jax.Array, observation: jax.Array) -> jax.Array:
            return policy.act(state.policy.params, key, observation)

        imagined = rollout_fn(model_params, key_rollout, act, dataset)
        replay = buffer.add(state.replay, imagined.transition, valid=imagined.valid)

        def learn(learner: State, step: jax.Array) -> tuple[State, Metrics]:
            key_batch, key_update = jax.random.split(
                jax.random.fold_in(key_learn, step)
            )
            return policy.update(
                key_update,
                learner,
                mixed_batch(key_batch, replay, model_params, dataset),
            )

        learner, metrics = jax.lax.scan(
            learn, state.policy, jnp.arange(config.updates_per_rollout)
        )
        metrics = jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)
        return ModelBasedState(learner, replay), {
            **metrics,
            **_rollout_metrics(imagined, replay),
        }

    return Learner(init, update)


def _mixed_batch(
    sample: Callable[[jax.Array, State], Transition],
    candidates_fn: CandidatesFn | None,
    num_real: int,
) -> Callable[..., Transition]:
    """Draws ``num_real`` recorded rows and the imagined ones of ``sample``."""

    def draw(
        key: jax.Array, replay: State, model_params: Any, dataset: Dataset
    ) -> Transition:
        key_imagined, key_real, *more = jax.random.split(
            key, 2 if candidates_fn is None else 3
        )
        imagined = sample(key_imagined, replay)
        if candidates_fn is not None:
            following = candidates_fn(
                model_params, more[0], imagined.observation, imagined.action
            )
            imagined = imagined._replace(next_observation=following)
        if num_real == 0:
            return imagined
        rows = jax.random.randint(key_real, (num_real,), 0, dataset.age.shape[0])
        return _joined(gather_transition(dataset, rows), imagined)

    return draw


def _joined(real: Transition, imagined: Transition) -> Transition:
    """Recorded rows, then imagined ones. Where these have several candidates of the next
    observation, a recorded row has one and the same for all of them."""
    known, following = real.next_observation, imagined.next_observation
    if following.ndim > known.ndim:
        known = jnp.broadcast_to(known[None], (len(following), *known.shape))
    # Any array will do for the field that is joined along another axis.
    rest = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]),
        real._replace(next_observation=real.observation),
        imagined._replace(next_observation=imagined.observation),
    )
    both = jnp.concatenate([known, following], axis=-2)
    return rest._replace(next_observation=both)


def _rollout_metrics(imagined: Imagined, replay: State) -> Metrics:
    """Of the steps that happened, and how many rows the buffer holds."""
    step, valid = imagined.transition, imagined.valid
    return {
        "model_reward": masked_mean(step.reward, valid),
        "model_uncertainty": masked_mean(imagined.uncertainty, valid),
        "model_rows": jnp.sum(valid).astype(jnp.float32),
        "model_terminated": masked_mean(step.terminated.astype(jnp.float32), valid),
        "buffer_rows": num_stored(replay).astype(jnp.float32),
    }
