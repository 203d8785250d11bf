"""Q-guided policy optimisation: a diffusion behaviour, guided by contrastive prediction.

The target is ``π(a|s) ∝ μ(a|s) exp(β Q(s, a))``, as in `aepo`; here ``E_t`` is learned from
*support actions*, draws of the behaviour model: which of them, all noised to the same time,
is it, when they count by ``softmax(β Q)``? The critics bootstrap from the same kind of draws,
``V(s') = Σ_i softmax_i(β Q(s', a'_i)) Q(s', a'_i)``, and so never leave the data.

The published code samples support actions for every state of the data once, from a finished
behaviour. Here a ring holds the states of the last updates with their actions: each update
samples a few more, from the behaviour as it is, and draws its batch from the ring. So there
is one update for all parts, and no support action outlives the ring.

References:
    Lu, Chen, Chen, Su, Li, Zhu, "Contrastive Energy Prediction for Exact Energy-Guided
    Diffusion Sampling in Offline Reinforcement Learning", ICML 2023, equations 11 and 13.
    https://arxiv.org/abs/2304.12824
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from emfuse_jax.base import (
    ActFn,
    Buffer,
    Metrics,
    Network,
    Params,
    Policy,
    SpaceSpec,
    Transition,
)
from emfuse_jax.data.buffer import ring_buffer
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.nets.critic import q_ensemble
from emfuse_jax.policies import _vp
from emfuse_jax.policies._guidance import (
    GuidanceState,
    energy_network,
    guidance_step,
    init_guidance,
    normalized,
    tilted_act,
    tilted_model,
)
from emfuse_jax.policies._learning import decayed_adam, gradient_step, running_mean
from emfuse_jax.policies._qgpo_config import QgpoConfig
from emfuse_jax.policies._qgpo_losses import (
    LOSSES,
    contrastive_energy_loss,
    regression_energy_loss,
    split_energy_loss,
    support_value,
)
from emfuse_jax.policies.diffusion import (
    DiffusionParams,
    DiffusionState,
    GuidedDiffusion,
    diffusion,
    diffusion_model,
    draw_times,
    guided_act,
)
from emfuse_jax.policies.online import example_transition
from emfuse_jax.policies.sac import critic_loss, critic_target

__all__ = [
    "QgpoConfig",
    "QgpoParams",
    "QgpoState",
    "Supported",
    "contrastive_energy_loss",
    "qgpo",
    "qgpo_model",
    "regression_energy_loss",
    "split_energy_loss",
    "support_value",
]


class Supported(NamedTuple):
    """States with actions that the behaviour would take there."""

    transition: Transition
    support: Float[Array, "*batch action act"]
    next_support: Float[Array, "*batch action act"]


class QgpoParams(NamedTuple):
    """``q`` are the target critics, ``energy`` the average of the guidance's weights."""

    behaviour: DiffusionParams
    q: Params
    energy: Params


class QgpoState(NamedTuple):
    """State of `qgpo`; ``ring`` holds `Supported` states."""

    behaviour: DiffusionState
    q: Params
    target_q: Params
    q_optimizer: optax.OptState
    energy: Params
    average: Params
    energy_optimizer: optax.OptState
    ring: Any
    value_square: jax.Array

    @property
    def params(self) -> QgpoParams:
        """What ``act`` and the model take."""
        return QgpoParams(self.behaviour.params, self.target_q, self.average)

    @property
    def step(self) -> jax.Array:
        """Updates so far."""
        return self.behaviour.step


def qgpo_model(
    config: QgpoConfig, spec: SpaceSpec, *, network: Network | None = None
) -> GuidedDiffusion:
    """Behaviour and guidance as functions of `QgpoParams`, to pool with other energies.

    Example:
        >>> model = qgpo_model(QgpoConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> callable(model.noise) and callable(model.guidance)  # to give to `fuse_policies`
        True
    """
    behaviour = diffusion_model(config.behaviour, spec, network=network)
    return tilted_model(behaviour, energy_network(config.guidance))


def qgpo(
    config: QgpoConfig,
    spec: SpaceSpec,
    *,
    network: Network | None = None,
    value_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Policy:
    """Q-guided policy optimisation by contrastive energy prediction.

    ``init(key, *, normalizer=None) -> QgpoState``; ``update(key, state, batch: Transition)
    -> (state, metrics)`` is one step of the behaviour on the batch, support actions for its
    first ``support_rows`` rows, and one step of critics and guidance on a batch of the ring;
    ``act`` as for `diffusion.guided_act`.

    Args:
        config: see `QgpoConfig`.
        spec: sizes of the spaces; actions live in [-1, 1] where the behaviour has a bound.
        network: of the behaviour, see `diffusion`.
        value_fn: a known ``Q(observation, action) -> [*batch]`` of raw observations, in
            place of the critics, which then do not train.

    Returns:
        A `Policy` whose state is a `QgpoState`.

    Raises:
        ValueError: from ``update``, at trace time, if a batch has fewer rows than
            ``support_rows``.

    Example:
        >>> policy = qgpo(QgpoConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> state = jax.eval_shape(policy.init, jax.random.key(0))
        >>> action = jax.eval_shape(policy.act, state.params, jax.random.key(0), jnp.zeros((7, 11)))
        >>> action.shape
        (7, 3)
    """
    parts = _Parts(
        behaviour=diffusion(config.behaviour, spec, network=network),
        draw=guided_act(
            diffusion_model(config.behaviour, spec, network=network),
            spec.action_size,
            num_steps=config.support_steps,
            scale=0.0,
            bound=config.behaviour.bound,
        ),
        critic=q_ensemble(config.num_critics, config.hidden_sizes),
        ring=ring_buffer(config.capacity, config.batch_size),
        value_fn=value_fn,
    )

    def init(key: jax.Array, *, normalizer: Normalizer | None = None) -> QgpoState:
        key_behaviour, key_q, key_energy = jax.random.split(key, 3)
        q = parts.critic.init(key_q, *(jnp.zeros(size) for size in spec))
        guidance = init_guidance(config.guidance, key_energy, spec)
        support = jnp.zeros((config.num_support, spec.action_size))
        row = Supported(example_transition(spec), support, support)
        return QgpoState(
            behaviour=parts.behaviour.init(key_behaviour, normalizer=normalizer),
            q=q,
            target_q=jax.tree.map(jnp.copy, q),
            q_optimizer=decayed_adam(config.learning_rate).init(q),
            energy=guidance.weights,
            average=guidance.average,
            energy_optimizer=guidance.optimizer,
            ring=parts.ring.init(row),
            value_square=jnp.zeros(()),
        )

    def update(
        key: jax.Array, state: QgpoState, batch: Transition
    ) -> tuple[QgpoState, Metrics]:
        return _update(config, parts, key, state, batch)

    model = qgpo_model(config, spec, network=network)
    act = tilted_act(model, config.behaviour, config.guidance, spec)
    return Policy(init, update, act, None)


class _Parts(NamedTuple):
    """What `qgpo` is made of; ``draw`` acts with the behaviour alone."""

    behaviour: Policy
    draw: ActFn
    critic: Network
    ring: Buffer
    value_fn: Callable[[jax.Array, jax.Array], jax.Array] | None

    def values(
        self, q: Params, observation: jax.Array, action: jax.Array
    ) -> Float[Array, "*batch action"]:
        """The smallest critic's, of ``action [*batch, action, act]``."""
        many = _repeated(observation, action)
        return jnp.min(self.critic.apply(q, many, action), axis=0)


def _update(
    config: QgpoConfig,
    parts: _Parts,
    key: jax.Array,
    state: QgpoState,
    batch: Transition,
) -> tuple[QgpoState, Metrics]:
    """The behaviour on the batch, support for its first rows, the rest on the ring."""
    key_behaviour, key_support, key_ring, key_energy = jax.random.split(key, 4)
    behaviour, learned = parts.behaviour.update(key_behaviour, state.behaviour, batch)
    params = behaviour.params
    supported = _add_support(config, parts, key_support, params, batch)
    ring = parts.ring.add(state.ring, supported)
    raw: Supported = parts.ring.sample(key_ring, ring)
    rows = raw._replace(transition=normalized(params.normalizer, raw.transition))
    if parts.value_fn is None:
        value = parts.values(state.target_q, rows.transition.observation, rows.support)
    else:
        observation = _repeated(raw.transition.observation, rows.support)
        value = parts.value_fn(observation, rows.support)
    square = running_mean(
        state.value_square,
        jnp.mean(jnp.var(value, axis=-1)),
        state.step,
        config.moment_rate,
    )
    unit = jnp.sqrt(jnp.maximum(square, 1e-12)) if config.normalize_values else 1.0
    state = state._replace(ring=ring, value_square=square)
    new, of_critics = _critic_step(config, parts, state, rows, unit)
    scaled = config.inverse_temperature * value / unit
    new, energy_loss = _energy_step(config, key_energy, new, rows, scaled)
    return new._replace(behaviour=behaviour), {
        "behaviour_loss": learned["loss"],
        **of_critics,
        "energy_loss": energy_loss,
        "value_mean": jnp.mean(value),
        "value_spread": jnp.sqrt(square),
    }


def _add_support(
    config: QgpoConfig,
    parts: _Parts,
    key: jax.Array,
    params: DiffusionParams,
    batch: Transition,
) -> Supported:
    """The batch's first states with actions of the behaviour as it is."""
    rows = batch.observation.shape[0]
    if rows < config.support_rows:
        raise ValueError(
            f"a batch of {rows} rows, support_rows={config.support_rows}; make the "
            "batch larger or support_rows smaller"
        )
    first = jax.tree.map(lambda leaf: leaf[: config.support_rows], batch)
    both = jnp.stack([first.observation, first.next_observation])
    many = jnp.repeat(both[..., None, :], config.num_support, axis=-2)
    now, following = parts.draw(params, key, many)
    return Supported(first, now, following)


def _critic_step(
    config: QgpoConfig,
    parts: _Parts,
    state: QgpoState,
    rows: Supported,
    unit: jax.Array | float,
) -> tuple[QgpoState, Metrics]:
    """New critics and targets; none where the value is known."""
    if parts.value_fn is not None:
        return state, {}
    step, bootstrap = rows.transition, config.target_inverse_temperature
    bootstrap = config.inverse_temperature if bootstrap is None else bootstrap
    next_value = support_value(
        parts.values(state.target_q, step.next_observation, rows.next_support),
        inverse_temperature=bootstrap / unit,
    )
    target = critic_target(
        config.reward_scale * step.reward,
        step.terminated,
        next_value[None],
        jnp.zeros_like(next_value),
        temperature=0.0,
        discount=config.discount,
    )

    def objective(q: Params) -> tuple[jax.Array, None]:
        found = parts.critic.apply(q, step.observation, step.action)
        return jnp.mean(critic_loss(found, target)), None

    q, optimizer, loss, _ = gradient_step(
        decayed_adam(config.learning_rate), objective, state.q, state.q_optimizer
    )
    target_q = optax.incremental_update(q, state.target_q, config.target_update_rate)
    new = state._replace(q=q, target_q=target_q, q_optimizer=optimizer)
    return new, {"critic_loss": loss, "q_target_mean": jnp.mean(target)}


def _energy_step(
    config: QgpoConfig,
    key: jax.Array,
    state: QgpoState,
    rows: Supported,
    value: Float[Array, "row action"],
) -> tuple[QgpoState, jax.Array]:
    """New guidance for ``value = βQ`` of the support; one time per state."""
    key_time, key_noise = jax.random.split(key)
    time = draw_times(key_time, value.shape[:1], config.behaviour.min_time)
    times = jnp.broadcast_to(time[:, None], value.shape)
    noise = jax.random.normal(key_noise, rows.support.shape)
    noisy = _vp.diffuse(rows.support, noise, times)
    observation = _repeated(rows.transition.observation, noisy)
    network = energy_network(config.guidance)

    def objective(weights: Params) -> jax.Array:
        found = network.apply(weights, noisy, times, observation)
        return jnp.mean(LOSSES[config.loss](found, value))

    old = GuidanceState(state.energy, state.average, state.energy_optimizer)
    new, loss = guidance_step(config.guidance, objective, old, state.step)
    state = state._replace(
        energy=new.weights, average=new.average, energy_optimizer=new.optimizer
    )
    return state, loss


def _repeated(observation: jax.Array, action: jax.Array) -> jax.Array:
    """``[*batch, obs]`` beside ``[*batch, action, act]``."""
    shape = (*action.shape[:-1], observation.shape[-1])
    return jnp.broadcast_to(observation[..., None, :], shape)
