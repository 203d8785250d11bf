"""Implicit behavioural cloning: an energy of observation and action, and its lowest action.

The energy learns by telling recorded actions from others (InfoNCE); acting searches its
minimum, with Langevin chains or a derivative-free population. An argmin may jump where the
experts do, and has as many modes as they; a regression has to go between.

What the energy is depends on the negatives. Uniform ones in the box, or a proposal of known
density with the ranking correction, make ``-E = log p(a|s) + c(s)`` at the optimum. A
proposal without the correction gives ``log p - log q``. Langevin negatives follow the energy
itself, so that ``q`` is unknown: the published recipe, whose energy is no log-density.

Inside, actions are scaled so that the box is ``[-1, 1]``: steps, clips and the penalty's
margin mean the same in every dimension and task.

References:
    Florence et al., "Implicit Behavioral Cloning", CoRL 2021, and its public code.
    https://arxiv.org/abs/2109.00137
    Singh, Tu, Sindhwani, "Revisiting Energy Based Models as Policies: Ranking Noise
    Contrastive Estimation and Interpolating Energy Models", TMLR 2024.
    https://arxiv.org/abs/2309.05803
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from emfuse_jax.base import (
    EnergyFn,
    Metrics,
    Params,
    Policy,
    Sampler,
    SpaceSpec,
    Transition,
)
from emfuse_jax.data import normalizer as normalization
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.loops import run_sampler
from emfuse_jax.losses.contrastive import info_nce, ranking_nce
from emfuse_jax.losses.negatives import chain_negatives, uniform_negatives
from emfuse_jax.losses.penalties import gradient_penalty
from emfuse_jax.nets.energy import EnergyNetwork, conditional_energy
from emfuse_jax.policies._action_box import (
    ActionBox,
    action_box,
    checked_box,
    scale,
    unscale,
)
from emfuse_jax.policies._ibc_config import IbcConfig, evaluations_per_action
from emfuse_jax.policies._learning import gradient_step
from emfuse_jax.samplers.derivative_free import derivative_free
from emfuse_jax.samplers.langevin import etm_langevin

__all__ = [
    "ActionBox",
    "IbcConfig",
    "IbcParams",
    "IbcState",
    "Proposal",
    "action_box",
    "evaluations_per_action",
    "ibc",
]


class Proposal(NamedTuple):
    """Negatives of known density, in raw units.

    ``draw(key, observation [*batch, obs], num) -> (actions [*batch, num, act], log q
    [*batch, num])``; ``log_prob(observation, action [*batch, act]) -> log q [*batch]``.
    """

    draw: Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]
    log_prob: Callable[[jax.Array, jax.Array], jax.Array]


class IbcParams(NamedTuple):
    """``energy`` is trained; ``normalizer`` is of observations, both others of the data."""

    energy: Params
    normalizer: Normalizer
    box: ActionBox


class IbcState(NamedTuple):
    """What `ibc` trains; ``step`` counts the updates."""

    params: IbcParams
    optimizer: optax.OptState
    step: jax.Array


def ibc(
    config: IbcConfig,
    spec: SpaceSpec,
    *,
    network: EnergyNetwork | None = None,
    proposal: Proposal | None = None,
) -> Policy:
    """Implicit behavioural cloning.

    ``init(key, *, normalizer=None, box=None) -> IbcState``: pass
    `data.normalizer.fit_normalizer` of the observations and `action_box` of the actions
    (None: raw observations, and the box [-1, 1]). ``update(key, state, batch: Transition)``
    reads observations and actions only. ``act`` takes the lowest candidate if
    deterministic, as published; otherwise one of them in proportion to ``exp(-E)``. Both
    need a key, for the candidates' starts. ``energy(params, observation, action)`` in raw
    units, low is likely.

    Args:
        config: see `IbcConfig`.
        spec: sizes of the spaces.
        network: of normalised observation and scaled action; None is
            `nets.energy.conditional_energy`.
        proposal: of the negatives, where ``config.negatives`` is "proposal".

    Raises:
        ValueError: if there is a proposal and no use for it, or none and one is needed.

    Example:
        >>> policy = ibc(IbcConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> state = jax.eval_shape(policy.init, jax.random.key(0))
        >>> observation, action = jnp.zeros((7, 11)), jnp.zeros((7, 3))
        >>> jax.eval_shape(policy.energy, state.params, observation, action).shape
        (7,)
    """
    if (proposal is None) == (config.negatives == "proposal"):
        raise ValueError(
            f"negatives={config.negatives!r} and proposal={proposal}; pass a Proposal "
            "exactly where negatives='proposal'"
        )
    if network is None:
        network = conditional_energy(config.hidden_sizes)
    optimizer = optax.adam(_learning_rate(config))

    def init(
        key: jax.Array,
        *,
        normalizer: Normalizer | None = None,
        box: ActionBox | None = None,
    ) -> IbcState:
        one, size = jnp.ones(spec.action_size), spec.observation_size
        if normalizer is None:
            normalizer = normalization.identity_normalizer(size)
        energy = network.init(key, jnp.zeros(size), one)
        box = (
            ActionBox(-one, one) if box is None else checked_box(box, spec.action_size)
        )
        params = IbcParams(energy, normalizer, box)
        return IbcState(params, optimizer.init(energy), jnp.zeros((), jnp.int32))

    def energy(
        params: IbcParams, observation: jax.Array, action: jax.Array
    ) -> jax.Array:
        energy_fn = _condition(network, params, observation)
        return energy_fn(scale(params.box, action))

    def update(
        key: jax.Array, state: IbcState, batch: Transition
    ) -> tuple[IbcState, Metrics]:
        return _update(config, network, proposal, optimizer, key, state, batch)

    def act(
        params: IbcParams,
        key: jax.Array | None,
        observation: jax.Array,
        *,
        deterministic: bool = False,
    ) -> jax.Array:
        if key is None:
            raise ValueError("act(key=None); candidates start at random: pass a key")
        key_search, key_choice = jax.random.split(key)
        energy_fn = _condition(network, params, observation)
        shape = (*observation.shape[:-1], config.num_samples, spec.action_size)
        candidates = _search(key_search, config, energy_fn, shape)
        chosen = _choose(
            key_choice, candidates, energy_fn(candidates), deterministic=deterministic
        )
        return unscale(params.box, chosen)

    return Policy(init, update, act, energy)


def _update(
    config: IbcConfig,
    network: EnergyNetwork,
    proposal: Proposal | None,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    state: IbcState,
    batch: Transition,
) -> tuple[IbcState, Metrics]:
    """One step; the negatives are of the energy as it was, and no gradient meets them."""
    params = state.params
    old_energy = _condition(network, params, batch.observation)
    negatives = _negatives(key, config, proposal, params.box, old_energy, batch)
    recorded = scale(params.box, batch.action)

    def objective(trained: Params) -> tuple[jax.Array, Metrics]:
        new = params._replace(energy=trained)
        energy_fn = _condition(network, new, batch.observation)
        return _loss(config, energy_fn, recorded, negatives)

    trained, new, _, metrics = gradient_step(
        optimizer, objective, params.energy, state.optimizer
    )
    params = params._replace(energy=trained)
    return IbcState(params, new, state.step + 1), metrics


def _choose(
    key: jax.Array,
    candidates: Float[Array, "*batch candidate act"],
    energies: Float[Array, "*batch candidate"],
    *,
    deterministic: bool,
) -> Float[Array, "*batch act"]:
    """The lowest candidate, or one in proportion to ``exp(-E)``; none without an energy."""
    energies = jnp.where(jnp.isnan(energies), jnp.inf, energies)
    if deterministic:
        index = jnp.argmin(energies, axis=-1)
    else:
        index = jax.random.categorical(key, -energies)
    chosen = jnp.take_along_axis(candidates, index[..., None, None], axis=-2)
    return chosen[..., 0, :]


def _learning_rate(config: IbcConfig) -> Any:
    if config.decay == 1.0:
        return config.learning_rate
    return optax.exponential_decay(
        config.learning_rate, 100, config.decay, staircase=True
    )


def _condition(
    network: EnergyNetwork, params: IbcParams, observation: jax.Array
) -> EnergyFn:
    """The energy of scaled actions ``[*batch, act]`` or ``[*batch, candidate, act]``, with
    the observation's half of the network read once."""
    normal = normalization.apply(params.normalizer, observation)
    projected = network.project(params.energy, normal)

    def energy_fn(scaled: jax.Array) -> jax.Array:
        one_each = scaled.ndim == projected.ndim
        spread = projected if one_each else projected[..., None, :]
        spread = jnp.broadcast_to(spread, (*scaled.shape[:-1], projected.shape[-1]))
        return network.energy(params.energy, spread, scaled)

    return energy_fn


class _Negatives(NamedTuple):
    """Scaled, with the log-densities of the proposal there and at the recorded actions."""

    action: Float[Array, "*batch negative act"]
    log_proposal: Float[Array, "*batch negative"]
    positive_log_proposal: Float[Array, "*batch"]


def _negatives(
    key: jax.Array,
    config: IbcConfig,
    proposal: Proposal | None,
    box: ActionBox,
    energy_fn: EnergyFn,
    batch: Transition,
) -> _Negatives:
    *rows, action_size = batch.action.shape
    if proposal is not None:
        drawn, log_q = proposal.draw(key, batch.observation, config.num_negatives)
        known = proposal.log_prob(batch.observation, batch.action)
        return jax.lax.stop_gradient(_Negatives(scale(box, drawn), log_q, known))
    key_start, key_chain = jax.random.split(key)
    shape = (*rows, config.num_negatives, action_size)
    drawn = uniform_negatives(key_start, shape)
    if config.negatives == "langevin":
        sampler = _chain(config, energy_fn)
        drawn = chain_negatives(key_chain, sampler, drawn, config.chain_steps)
    # A uniform density is the same everywhere, so it corrects nothing.
    return _Negatives(drawn, jnp.zeros(shape[:-1]), jnp.zeros(tuple(rows)))


def _loss(
    config: IbcConfig, energy_fn: EnergyFn, action: jax.Array, negatives: _Negatives
) -> tuple[jax.Array, Metrics]:
    """Contrast and gradient penalty, over the recorded action and its negatives."""
    candidates = jnp.concatenate([action[..., None, :], negatives.action], axis=-2)
    energies = energy_fn(candidates)
    observed, others = energies[..., 0], energies[..., 1:]
    if config.ranking_correction:
        log_proposals = negatives.positive_log_proposal, negatives.log_proposal
        contrastive = jnp.mean(ranking_nce(observed, others, *log_proposals))
    else:
        contrastive = jnp.mean(info_nce(observed, others))
    penalty = jnp.zeros(())
    if config.penalty > 0:
        steep = gradient_penalty(
            energy_fn, candidates, margin=config.margin, order=jnp.inf
        )
        penalty = jnp.mean(steep)
    total = contrastive + config.penalty * penalty
    return total, {
        "loss": total,
        "contrastive": contrastive,
        "penalty": penalty,
        "accuracy": jnp.mean(jnp.all(observed[..., None] < others, axis=-1)),
        "gap": jnp.mean(others) - jnp.mean(observed),
    }


def _chain(config: IbcConfig, energy_fn: EnergyFn, *, second: bool = False) -> Sampler:
    """``η (½ ∇E + noise · ε)`` with clipped steps, in the box."""
    return etm_langevin(
        energy_fn,
        config.chain_steps,
        first=config.last_step if second else config.first_step,
        last=config.last_step,
        noise=0.5 * config.noise if second else config.noise,
        drift_clip=None,
        step_clip=config.step_clip,
        bounds=(-1.0, 1.0),
    )


def _search(
    key: jax.Array, config: IbcConfig, energy_fn: EnergyFn, shape: tuple[int, ...]
) -> jax.Array:
    """Candidates ``[*batch, candidate, act]`` of low energy, from uniform ones."""
    key_start, key_first, key_second = jax.random.split(key, 3)
    position = uniform_negatives(key_start, shape)
    if config.inference == "derivative_free":
        sampler = derivative_free(energy_fn, noise=config.search_noise)
        return run_sampler(key_first, sampler, position, config.search_steps)[
            0
        ].position
    sampler = _chain(config, energy_fn)
    position = run_sampler(key_first, sampler, position, config.chain_steps)[0].position
    if config.second_pass:
        sampler = _chain(config, energy_fn, second=True)
        state, _ = run_sampler(key_second, sampler, position, config.chain_steps)
        position = state.position
    return position
