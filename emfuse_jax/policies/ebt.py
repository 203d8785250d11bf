"""Energy-based transformer policy: the action is where a short descent of an energy ends.

Training regresses the end of a descent that starts at noise to the recorded action, through
the descent (second derivatives of the energy). There are no negatives and no partition
function, so energies rank actions of one observation; acting spends as many steps as each
row needs, and the energy that is left says how sure the policy is.

A regression of ends whose starts know nothing of the target learns the conditional mean:
where two actions are right it answers between them. With ``num_starts`` above 1 several
descents are made for each recorded action and the one that ends nearest is trained on
(implicit maximum likelihood), with which the modes stay apart and keep their shares.

References:
    Davies et al., "EBT-Policy: Energy Unlocks Emergent Physical Reasoning Capabilities",
    2025, and its public code. https://arxiv.org/abs/2510.27545
    Gladstone et al., "Energy-Based Transformers are Scalable Learners and Thinkers",
    2025, sections 3.3 and 3.4 (S1 and S2). https://arxiv.org/abs/2507.02092
    Li, Malik, "Implicit Maximum Likelihood Estimation", 2018.
    https://arxiv.org/abs/1809.09087 (the nearest of several; for policies: Rana et al.,
    "IMLE Policy", RSS 2025, https://arxiv.org/abs/2502.12371).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from emfuse_jax._settings import require_key
from emfuse_jax.base import (
    EnergyFn,
    Metrics,
    Network,
    Params,
    Policy,
    SpaceSpec,
    Transition,
)
from emfuse_jax.data import normalizer as normalization
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.nets.energy import EnergyNetwork
from emfuse_jax.nets.transformer import EnergyTransformer, energy_transformer
from emfuse_jax.policies._ebt_config import EbtConfig, s1_config, s2_config
from emfuse_jax.policies._ebt_loss import descent_loss, policy_descent
from emfuse_jax.samplers.descent import minimize

__all__ = [
    "EbtConfig",
    "EbtParams",
    "EbtState",
    "Refinement",
    "ebt_policy",
    "ebt_refine",
    "s1_config",
    "s2_config",
]

AnyEnergy = EnergyTransformer | EnergyNetwork | Network
"""A network with ``project`` and ``energy``, or with ``apply`` alone."""


class EbtParams(NamedTuple):
    """``network`` is the average of the weights; ``normalizer`` is of observations."""

    network: Params
    normalizer: Normalizer


class EbtState(NamedTuple):
    """``network`` holds the trained weights, ``params`` their average."""

    params: EbtParams
    network: Params
    optimizer: optax.OptState
    step: jax.Array


class Refinement(NamedTuple):
    """An action and what its descent took.

    ``energy`` is lower the surer the policy is, among actions of one observation;
    ``num_steps`` is each row's own, and one gradient more was evaluated where it stopped
    early; a row with ``energy > start_energy`` was taken too far (`max_step_size`).
    """

    action: Float[Array, "*batch act"]
    energy: Float[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]
    start_energy: Float[Array, "*batch"]


def ebt_policy(
    config: EbtConfig, spec: SpaceSpec, *, network: AnyEnergy | None = None
) -> Policy:
    """Behaviour cloning by descending a learned energy.

    ``init(key, *, normalizer=None) -> EbtState``, the normaliser being one of (stacked)
    observations; ``update(key, state, batch: Transition)`` reads observations and actions
    only; ``act`` descends from noise, ``deterministic`` from one and the same draw of it;
    actions are clipped to [-1, 1]. What a descent took: `ebt_refine`.

    Args:
        config: see `EbtConfig`.
        spec: sizes of a stacked observation, ``num_frames * obs``, and of a flattened
            chunk, ``horizon * act``.
        network: an energy ``[*batch, obs], [*batch, act] -> [*batch]``; None is
            `nets.transformer.energy_transformer`.

    Returns:
        A `Policy` whose state is an `EbtState`.

    Raises:
        ValueError: if ``config.horizon`` or ``config.num_frames`` does not divide the
            size it should.

    Example:
        >>> spec = SpaceSpec(observation_size=11, action_size=3)
        >>> policy = ebt_policy(EbtConfig(), spec)
        >>> state = jax.eval_shape(policy.init, jax.random.key(0))
        >>> action = jax.eval_shape(policy.act, state.params, jax.random.key(0), jnp.zeros((7, 11)))
        >>> action.shape
        (7, 3)
    """
    network = _default_network(config, spec) if network is None else network
    refine = ebt_refine(config, spec, network=network)
    optimizer = _optimizer(config)

    def init(key: jax.Array, *, normalizer: Normalizer | None = None) -> EbtState:
        size = spec.observation_size
        if normalizer is None:
            normalizer = normalization.identity_normalizer(size)
        weights = network.init(key, jnp.zeros(size), jnp.zeros(spec.action_size))
        return EbtState(
            params=EbtParams(jax.tree.map(jnp.copy, weights), normalizer),
            network=weights,
            optimizer=optimizer.init(weights),
            step=jnp.zeros((), jnp.int32),
        )

    def update(
        key: jax.Array, state: EbtState, batch: Transition
    ) -> tuple[EbtState, Metrics]:
        observation = normalization.apply(state.params.normalizer, batch.observation)

        def objective(weights: Params) -> tuple[jax.Array, Metrics]:
            energy_fn = _bind(network, weights, observation)
            loss, metrics = descent_loss(key, energy_fn, batch.action, config)
            return jnp.mean(loss), metrics

        gradient_fn = jax.value_and_grad(objective, has_aux=True)
        (loss, metrics), gradient = gradient_fn(state.network)
        updates, new = optimizer.update(gradient, state.optimizer, state.network)
        weights = optax.apply_updates(state.network, updates)
        rate = (1.0 + state.step) ** -config.average_power
        average = optax.incremental_update(weights, state.params.network, rate)
        params = state.params._replace(network=average)
        metrics |= {"loss": loss, "update_norm": optax.tree.norm(gradient)}
        return EbtState(params, weights, new, state.step + 1), metrics

    def act(
        params: EbtParams,
        key: jax.Array | None,
        observation: jax.Array,
        /,
        *,
        deterministic: bool = False,
    ) -> jax.Array:
        return refine(params, key, observation, deterministic=deterministic).action

    def energy(
        params: EbtParams, observation: jax.Array, action: jax.Array
    ) -> jax.Array:
        normal = normalization.apply(params.normalizer, observation)
        return _bind(network, params.network, normal)(action)

    return Policy(init, update, act, energy)


def ebt_refine(
    config: EbtConfig, spec: SpaceSpec, *, network: AnyEnergy | None = None
) -> Callable[..., Refinement]:
    """The descent with which `ebt_policy` acts, and its report.

    ``refine(params, key, observation, *, deterministic=False, start=None) -> Refinement``;
    ``start [*batch, act]`` is where to begin, say at the last chunk moved on; by default
    it begins at noise. The policy's ``act`` returns its ``action``.

    Args:
        config: ``act_steps``, ``tolerance`` and ``num_candidates`` say how far.
        spec: as for `ebt_policy`.
        network: as for `ebt_policy`.

    Example:
        >>> spec = SpaceSpec(observation_size=11, action_size=3)
        >>> params = jax.eval_shape(ebt_policy(EbtConfig(), spec).init, jax.random.key(0)).params
        >>> refine = ebt_refine(EbtConfig(), spec)
        >>> report = jax.eval_shape(refine, params, jax.random.key(0), jnp.zeros((7, 11)))
        >>> report.action.shape
        (7, 3)
    """
    network = _default_network(config, spec) if network is None else network
    num_candidates = config.num_candidates

    def refine(
        params: EbtParams,
        key: jax.Array | None,
        observation: jax.Array,
        *,
        deterministic: bool = False,
        start: jax.Array | None = None,
    ) -> Refinement:
        normal = normalization.apply(params.normalizer, observation)
        lead = (num_candidates, *observation.shape[:-1])
        shape = (*lead, spec.action_size)
        if start is not None:
            start = jnp.broadcast_to(start, shape)
        elif deterministic:
            # One draw for every row: which of several basins is entered then depends on
            # the observation only, and changes as little as it does.
            one = jax.random.normal(
                jax.random.key(0), (num_candidates, spec.action_size)
            )
            ones = (1,) * (observation.ndim - 1)
            start = one.reshape(num_candidates, *ones, spec.action_size)
            start = jnp.broadcast_to(start, shape)
        else:
            start = jax.random.normal(require_key(key), shape)
        energy_fn = _bind(network, params.network, normal, num_candidates)
        end = minimize(
            jax.random.key(0),  # nothing is drawn: acting adds no noise
            energy_fn,
            policy_descent(config, energy_fn, config.step_size, spec.action_size),
            start,
            config.act_steps,
            tolerance=config.tolerance,
        )
        action = jnp.clip(end.position, -1.0, 1.0)
        every = Refinement(action, energy_fn(action), *end[2:])
        if num_candidates == 1:
            return jax.tree.map(lambda leaf: leaf[0], every)
        finite = jnp.where(jnp.isnan(every.energy), jnp.inf, every.energy)
        best = jnp.argmin(finite, axis=0)

        def pick(leaf: jax.Array) -> jax.Array:
            index = best.reshape((1, *best.shape) + (1,) * (leaf.ndim - best.ndim - 1))
            return jnp.take_along_axis(leaf, index, axis=0)[0]

        return jax.tree.map(pick, every)

    return refine


def _default_network(config: EbtConfig, spec: SpaceSpec) -> EnergyTransformer:
    if spec.observation_size % config.num_frames:
        raise ValueError(
            f"num_frames={config.num_frames} does not divide observation_size="
            f"{spec.observation_size}; observations are flattened stacks of frames"
        )
    return energy_transformer(
        spec.action_size,
        num_frames=config.num_frames,
        horizon=config.horizon,
        config=config.network,
    )


def _bind(
    network: AnyEnergy,
    weights: Params,
    observation: jax.Array,
    num_candidates: int | None = None,
) -> EnergyFn:
    """``action -> energy``, or of ``[candidate, *batch, act]``, the observation read once."""

    def widen(leaf: jax.Array) -> jax.Array:
        if num_candidates is None:
            return leaf
        return jnp.broadcast_to(leaf, (num_candidates, *leaf.shape))

    if isinstance(network, Network):
        wide = widen(observation)
        return lambda action: network.apply(weights, wide, action)
    projected = jax.tree.map(widen, network.project(weights, observation))
    return lambda action: network.energy(weights, projected, action)


def _optimizer(config: EbtConfig) -> optax.GradientTransformation:
    if config.decay_steps is None:
        rate = optax.linear_schedule(
            0.0, config.learning_rate, max(config.warmup_steps, 1)
        )
    else:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warmup_steps, config.decay_steps
        )
    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )
