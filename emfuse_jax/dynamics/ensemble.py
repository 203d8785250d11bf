"""Probabilistic ensembles: the Gaussian baseline, whose uncertainty costs K models.

Reference: Yu et al., "MOPO: model-based offline policy optimization", NeurIPS 2020. Trained
by β-NLL (Seitzer et al., ICLR 2022): the plain likelihood gives up on the rows with contact,
which carry the error.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from emfuse_jax.base import (
    Dynamics,
    History,
    Metrics,
    Network,
    Params,
    Prediction,
    SpaceSpec,
    TransitionModel,
)
from emfuse_jax.data.normalizer import apply as normalize
from emfuse_jax.dynamics._energy_losses import beta_nll
from emfuse_jax.dynamics._energy_model import mean_and_log_std
from emfuse_jax.dynamics.base import Batch, Scales, pack_target
from emfuse_jax.dynamics.uncertainty import historical_slice_uncertainty
from emfuse_jax.nets.mlp import mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """An ensemble of one-step Gaussian MLPs; ``num_members=1`` is a plain MLP.

    Attributes:
        num_members: networks, trained from different weights on batches of their
            own.
        hidden_sizes: hidden layers of a member.
        learning_rate: Adam's, decayed by a cosine to 0 over ``num_steps``.
        num_steps: updates in all: the horizon of the decay.
        batch_size: rows per member and update.
        beta: β of β-NLL.
    """

    num_members: int = 5
    hidden_sizes: tuple[int, ...] = (200, 200)
    learning_rate: float = 1e-3
    num_steps: int = 20_000
    batch_size: int = 256
    beta: float = 0.5


class EnsembleParams(NamedTuple):
    """The coordinates that all members share, and the members."""

    scales: Scales
    members: Params
    """Leaves ``[model, …]``."""


class EnsembleState(NamedTuple):
    """What `gaussian_ensemble` trains; ``step`` counts the updates."""

    params: EnsembleParams
    optimizer: optax.OptState
    step: jax.Array


def gaussian_ensemble(config: EnsembleConfig, spec: SpaceSpec) -> Dynamics:
    """The ensemble: ``init(key, scales)``, ``update(key, state, Batch)`` and ``model``.

    ``update`` takes ``num_members * batch_size`` windows and gives every member its own
    part. ``predict`` moves by the members' mean (deterministic); the uncertainty is their
    spread, in units of the one-step scale, and the energy is the mean negative
    log-density up to a constant.

    Example:
        >>> from emfuse_jax.data import linear_gaussian
        >>> from emfuse_jax.dynamics import fit_scales
        >>> dataset, _ = linear_gaussian(num_episodes=4, length=10)
        >>> learner = gaussian_ensemble(EnsembleConfig(num_members=7), SpaceSpec(3, 2))
        >>> state = jax.eval_shape(learner.init, jax.random.key(0), fit_scales(dataset, 1))
        >>> {leaf.shape[0] for leaf in jax.tree.leaves(state.params.members)}  # [model, …]
        {7}
    """
    net = mlp(
        2 * (spec.observation_size + 1), config.hidden_sizes, activation=jax.nn.silu
    )
    optimizer = optax.adam(
        optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    )

    def init(key: jax.Array, scales: Scales) -> EnsembleState:
        # A copy: the caller keeps its scales when a training loop donates the state.
        scales = jax.tree.map(jnp.array, scales)
        example = jnp.zeros((1, spec.observation_size + spec.action_size))
        keys = jax.random.split(key, config.num_members)
        members = jax.vmap(net.init, in_axes=(0, None))(keys, example)
        return EnsembleState(
            EnsembleParams(scales, members),
            optimizer.init(members),
            jnp.zeros((), jnp.int32),
        )

    def update(
        key: jax.Array, state: EnsembleState, batch: Batch
    ) -> tuple[EnsembleState, Metrics]:
        del key
        scales, members = state.params
        objective = functools.partial(_objective, net, config, scales, batch)
        loss, grads = jax.value_and_grad(objective)(members)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, members)
        params = EnsembleParams(scales, optax.apply_updates(members, updates))
        return EnsembleState(params, optimizer_state, state.step + 1), {
            "loss": loss / config.num_members
        }

    return Dynamics(init, update, _model(net))


def _forward(
    net: Network,
    scales: Scales,
    member: Params,
    observation: Float[Array, "*batch obs"],
    action: Float[Array, "*batch act"],
) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch dim"]]:
    """One member's mean and log standard deviation of the scaled target."""
    inputs = [
        normalize(scales.observation, observation),
        normalize(scales.action, action),
    ]
    return mean_and_log_std(net.apply(member, jnp.concatenate(inputs, axis=-1)))


def _objective(
    net: Network,
    config: EnsembleConfig,
    scales: Scales,
    batch: Batch,
    members: Params,
) -> Float[Array, ""]:
    """The sum over members of the mean β-NLL over each one's own part of the batch."""
    observation, action = batch.history.observation[0], batch.history.action[0]
    if observation.shape[0] % config.num_members:
        raise ValueError(
            f"a batch of {observation.shape[0]} windows does not divide among "
            f"num_members={config.num_members}; sample num_members * batch_size"
        )
    target = normalize(
        jax.tree.map(lambda leaf: leaf[0], scales.target),
        pack_target(observation, batch.next_observation, batch.reward),
    )

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(config.num_members, -1, x.shape[-1])

    forward = jax.vmap(functools.partial(_forward, net, scales))
    mean, log_std = forward(members, split(observation), split(action))
    residual = (split(target) - mean) * jnp.exp(-log_std)
    loss = jnp.sum(beta_nll(residual, log_std, config.beta), axis=-1)
    return jnp.sum(jnp.mean(loss, axis=-1))


def _model(net: Network) -> TransitionModel:
    def gaussians(
        params: EnsembleParams, history: History
    ) -> tuple[jax.Array, jax.Array]:
        forward = functools.partial(_forward, net, params.scales)
        mean, log_std = jax.vmap(forward, in_axes=(0, None, None))(
            params.members, history.observation[0], history.action[0]
        )
        target = jax.tree.map(lambda leaf: leaf[0], params.scales.target)
        shape = (1,) * (mean.ndim - 1) + target.scale.shape
        mean = target.mean.reshape(shape) + target.scale.reshape(shape) * mean
        return mean, target.scale.reshape(shape) * jnp.exp(log_std)

    def uncertainty(params: EnsembleParams, history: History) -> jax.Array:
        mean, _ = gaussians(params, history)
        return historical_slice_uncertainty(
            mean[..., :-1], unit=params.scales.target.scale[0, :-1]
        )

    def energy(
        params: EnsembleParams,
        history: History,
        next_observation: jax.Array,
        reward: jax.Array,
    ) -> jax.Array:
        mean, std = gaussians(params, history)
        target = pack_target(history.observation[0], next_observation, reward)[None]
        per_dim = 0.5 * jnp.square((target - mean) / std) + jnp.log(std)
        return jnp.mean(jnp.sum(per_dim, axis=-1), axis=0)

    def predict(params: EnsembleParams, key: jax.Array, history: History) -> Prediction:
        del key
        mean, _ = gaussians(params, history)
        target = jnp.mean(mean, axis=0)
        following, reward = history.observation[0] + target[..., :-1], target[..., -1]
        return Prediction(
            following,
            reward,
            uncertainty(params, history),
            energy(params, history, following, reward),
        )

    return TransitionModel(predict, energy, uncertainty)
