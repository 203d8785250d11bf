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

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from emfuse_jax.base import Metrics, Network, Params, Policy, SpaceSpec, Transition
from emfuse_jax.data.buffer import ring_buffer
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.nets.critic import q_ensemble
from emfuse_jax.policies import _vp
from emfuse_jax.policies._guidance import (
    GuidanceConfig,
    energy_network,
    normalized,
    tilted_model,
)
from emfuse_jax.policies.diffusion import (
    DiffusionConfig,
    DiffusionParams,
    DiffusionState,
    GuidedDiffusion,
    decayed_adam,
    diffusion,
    diffusion_model,
    draw_times,
    guided_act,
    moving_average,
)
from emfuse_jax.policies.sac import critic_loss, critic_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class QgpoConfig:
    """Settings of `qgpo`.

    Attributes:
        behaviour: the diffusion model of the recorded actions.
        guidance: the energy network and its use.
        loss: contrastive: the published one, exact for very many support actions. split:
            exact for any number, see `split_energy_loss`. regression: on ``-β Q`` of the
            clean action, which learns its mean instead of its log-mean-exp; biased, for
            comparison.
        inverse_temperature: ``β`` of the guidance, 0 or more; in units of the values'
            standard deviation over a state's support where ``normalize_values``.
        target_inverse_temperature: ``β`` of the bootstrap; none: the same.
        normalize_values: divide values by the running standard deviation over support
            actions.
        num_support: actions per state.
        support_rows: states that get support actions in each update.
        support_steps: denoiser evaluations per support action.
        capacity: states in the ring.
        batch_size: states per update of critics and guidance.
        hidden_sizes: of the critics.
        num_critics: size of the ensemble whose minimum is the value.
        learning_rate: Adam, for the critics.
        discount: ``γ``.
        reward_scale: factor on every reward.
        target_update_rate: of the target critics.
        moment_rate: of the running scale of the values.
    """

    behaviour: DiffusionConfig = DiffusionConfig()  # noqa: RUF009
    guidance: GuidanceConfig = GuidanceConfig()  # noqa: RUF009
    loss: Literal["contrastive", "split", "regression"] = "contrastive"
    inverse_temperature: float = 1.0
    target_inverse_temperature: float | None = None
    normalize_values: bool = True
    num_support: int = 16
    support_rows: int = 8
    support_steps: int = 10
    capacity: int = 4096
    batch_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 256)
    num_critics: int = 2
    learning_rate: float = 3e-4
    discount: float = 0.99
    reward_scale: float = 1.0
    target_update_rate: float = 0.005
    moment_rate: float = 0.003

    def __post_init__(self) -> None:
        if self.loss not in _LOSSES:
            raise ValueError(f"loss={self.loss!r}; expected one of {tuple(_LOSSES)}")
        for name in ("inverse_temperature", "target_inverse_temperature"):
            value = getattr(self, name)
            if value is not None and not value >= 0.0:
                raise ValueError(
                    f"{name}={value}; expected 0 (the behaviour) or more: a negative one "
                    "prefers bad actions"
                )
        if self.num_support < 4:
            raise ValueError(
                f"num_support={self.num_support}; expected at least 4 actions per state: "
                "few cannot be ranked"
            )
        for name in ("support_rows", "support_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.capacity < self.support_rows:
            raise ValueError(
                f"capacity={self.capacity} holds fewer states than one update adds; "
                f"expected at least support_rows={self.support_rows}"
            )
        if not 0.0 <= self.discount <= 1.0:
            raise ValueError(f"discount={self.discount}; expected a number in [0, 1]")
        for name in ("target_update_rate", "moment_rate"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(
                    f"{name}={getattr(self, name)}; expected a rate in (0, 1]"
                )
        if not self.reward_scale > 0.0:
            raise ValueError(
                f"reward_scale={self.reward_scale}; expected a positive factor"
            )


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


def contrastive_energy_loss(
    energy: Float[Array, "*batch action"], value: Float[Array, "*batch action"]
) -> Float[Array, "*batch"]:
    """``-Σ_i softmax_i(βQ) log softmax_i(-E_t(a_t^i))``, equation 11.

    All actions of a row are draws of one behaviour, noised to one time. With infinitely many
    of them the optimum is ``E_t = -log E[exp(βQ)|a_t]`` up to a constant of state and time;
    with few the best actions count too little, because they stand in their own
    normaliser (see `split_energy_loss`).

    Args:
        energy: ``E_t`` of the noised actions; low is good.
        value: ``βQ`` of the clean ones.

    Example:
        >>> value = jnp.log(jnp.array([1.0, 3.0]))
        >>> loss = [contrastive_energy_loss(e * value, value) for e in (-1.0, 0.0)]
        >>> [f"{x:.3f}" for x in loss]  # the entropy of (1/4, 3/4), then log 2
        ['0.562', '0.693']
    """
    weight = jax.nn.softmax(value, axis=-1)
    return -jnp.sum(weight * jax.nn.log_softmax(-energy, axis=-1), axis=-1)


def split_energy_loss(
    energy: Float[Array, "*batch action"],
    value: Float[Array, "*batch action"],
    *,
    max_weight: float = 100.0,
) -> Float[Array, "*batch"]:
    """As `contrastive_energy_loss`, exact for any number of actions.

    Each half of the actions is ranked by ``exp(βQ_i)`` over the mean of ``exp(βQ)`` in the
    *other* half. That normaliser is independent of what it weighs, so the loss is
    InfoNCE with positives from ``μ exp(βQ)/Z`` and negatives from ``μ``, whose optimum is
    the log-ratio of the two whatever their number.

    Args:
        energy: ``E_t`` of the noised actions.
        value: ``βQ`` of the clean ones.
        max_weight: bound of a weight, where the other half has no good action at all.

    Example:
        >>> value = jnp.array([[4.0, 0.0, 4.0, 0.0]])
        >>> right = split_energy_loss(-value, value)  # low energies where values are high
        >>> wrong = split_energy_loss(value, value)
        >>> bool(right[0] < wrong[0])
        True
    """
    half = value.shape[-1] // 2
    losses = []
    for own, other in (
        (slice(None, half), slice(half, None)),
        (slice(half, None), slice(None, half)),
    ):
        rest = value[..., other]
        level = jax.nn.logsumexp(rest, axis=-1, keepdims=True) - jnp.log(rest.shape[-1])
        weight = jnp.exp(jnp.minimum(value[..., own] - level, jnp.log(max_weight)))
        ranked = jax.nn.log_softmax(-energy[..., own], axis=-1)
        losses.append(-jnp.mean(weight * ranked, axis=-1))
    return 0.5 * (losses[0] + losses[1])


def regression_energy_loss(
    energy: Float[Array, "*batch action"], value: Float[Array, "*batch action"]
) -> Float[Array, "*batch"]:
    """Mean of ``(E_t + βQ)²``: learns ``E[βQ|a_t]``, a lower bound of ``-E_t``. Biased.

    The mean of the row's other actions is taken out of ``βQ``; it guides nowhere.

    Example:
        >>> value = jnp.array([[1.0, 3.0]])
        >>> regression_energy_loss(jnp.array([[2.0, -2.0]]), value).tolist()  # others: 3 and 1
        [0.0]
    """
    total = jnp.sum(value, axis=-1, keepdims=True)
    others = (total - value) / (value.shape[-1] - 1)
    return jnp.mean(jnp.square(energy + value - others), axis=-1)


_LOSSES = {
    "contrastive": contrastive_energy_loss,
    "split": split_energy_loss,
    "regression": regression_energy_loss,
}


def support_value(
    value: Float[Array, "*batch action"], *, inverse_temperature: ArrayLike
) -> Float[Array, "*batch"]:
    """``Σ_i softmax_i(β Q_i) Q_i``: the value of the tilted policy on its support.

    Example:
        >>> float(support_value(jnp.array([1.0, 3.0]), inverse_temperature=0.0))
        2.0
    """
    weight = jax.nn.softmax(inverse_temperature * value, axis=-1)
    return jnp.sum(weight * value, axis=-1)


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
        value_fn: a known ``Q(observation, action) -> [*batch]`` in place of the critics,
            which then do not train.

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
    behaviour = diffusion(config.behaviour, spec, network=network)
    model = qgpo_model(config, spec, network=network)
    draw = guided_act(
        diffusion_model(config.behaviour, spec, network=network),
        spec.action_size,
        num_steps=config.support_steps,
        scale=0.0,
        bound=config.behaviour.bound,
    )
    critic = q_ensemble(config.num_critics, config.hidden_sizes)
    energy = energy_network(config.guidance)
    critic_optimizer = optax.adam(config.learning_rate)
    energy_optimizer = decayed_adam(
        config.guidance.learning_rate, config.guidance.decay_steps
    )
    ring = ring_buffer(config.capacity, config.batch_size)

    def init(key: jax.Array, *, normalizer: Normalizer | None = None) -> QgpoState:
        key_behaviour, key_q, key_energy = jax.random.split(key, 3)
        observation, action = (jnp.zeros(size) for size in spec)
        q = critic.init(key_q, observation, action)
        weights = energy.init(key_energy, action, jnp.zeros(()), observation)
        support = jnp.zeros((config.num_support, spec.action_size))
        zero, false = jnp.zeros(()), jnp.zeros((), bool)
        row = Transition(observation, action, zero, observation, false, false)
        return QgpoState(
            behaviour=behaviour.init(key_behaviour, normalizer=normalizer),
            q=q,
            target_q=jax.tree.map(jnp.copy, q),
            q_optimizer=critic_optimizer.init(q),
            energy=weights,
            average=jax.tree.map(jnp.copy, weights),
            energy_optimizer=energy_optimizer.init(weights),
            ring=ring.init(Supported(row, support, support)),
            value_square=jnp.zeros(()),
        )

    def values(q: Params, observation: jax.Array, action: jax.Array) -> jax.Array:
        """The smallest critic's, of ``action [*batch, action, act]``."""
        many = _repeated(observation, action)
        if value_fn is not None:
            return value_fn(many, action)
        return jnp.min(critic.apply(q, many, action), axis=0)

    def add_support(
        key: jax.Array, params: DiffusionParams, batch: Transition
    ) -> Supported:
        rows = batch.observation.shape[0]
        if rows < config.support_rows:
            raise ValueError(
                f"a batch of {rows} rows, support_rows={config.support_rows}; make the "
                "batch larger or support_rows smaller"
            )
        first = jax.tree.map(lambda leaf: leaf[: config.support_rows], batch)
        both = jnp.stack([first.observation, first.next_observation])
        many = jnp.repeat(both[..., None, :], config.num_support, axis=-2)
        now, following = draw(params, key, many)
        return Supported(first, now, following)

    def critic_step(
        state: QgpoState, rows: Supported, unit: jax.Array | float
    ) -> tuple[dict[str, Any], Metrics]:
        """New critics, their targets and optimiser, as fields of the state."""
        if value_fn is not None:
            return {}, {}
        step, bootstrap = rows.transition, config.target_inverse_temperature
        bootstrap = config.inverse_temperature if bootstrap is None else bootstrap
        next_value = support_value(
            values(state.target_q, step.next_observation, rows.next_support),
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

        def objective(q: Params) -> jax.Array:
            found = critic.apply(q, step.observation, step.action)
            return jnp.mean(critic_loss(found, target))

        loss, gradient = jax.value_and_grad(objective)(state.q)
        change, optimizer = critic_optimizer.update(gradient, state.q_optimizer)
        q = optax.apply_updates(state.q, change)
        target_q = optax.incremental_update(
            q, state.target_q, config.target_update_rate
        )
        new = {"q": q, "target_q": target_q, "q_optimizer": optimizer}
        return new, {"critic_loss": loss, "target_mean": jnp.mean(target)}

    def energy_step(
        key: jax.Array, state: QgpoState, rows: Supported, value: jax.Array
    ) -> tuple[dict[str, Any], Metrics]:
        """New guidance for ``value = βQ`` of the support; one time per state."""
        key_time, key_noise = jax.random.split(key)
        time = draw_times(key_time, value.shape[:1], config.behaviour.min_time)
        times = jnp.broadcast_to(time[:, None], value.shape)
        noise = jax.random.normal(key_noise, rows.support.shape)
        noisy = _vp.diffuse(rows.support, noise, times)
        observation = _repeated(rows.transition.observation, noisy)

        def objective(weights: Params) -> jax.Array:
            found = energy.apply(weights, noisy, times, observation)
            return jnp.mean(_LOSSES[config.loss](found, value))

        loss, gradient = jax.value_and_grad(objective)(state.energy)
        change, optimizer = energy_optimizer.update(gradient, state.energy_optimizer)
        weights = optax.apply_updates(state.energy, change)
        average = moving_average(
            weights, state.average, state.step, config.guidance.average_rate
        )
        new = {"energy": weights, "average": average, "energy_optimizer": optimizer}
        return new, {"energy_loss": loss}

    def update(
        key: jax.Array, state: QgpoState, batch: Transition
    ) -> tuple[QgpoState, Metrics]:
        keys = jax.random.split(key, 4)
        new_behaviour, learned = behaviour.update(keys[0], state.behaviour, batch)
        params = new_behaviour.params
        stored = ring.add(state.ring, add_support(keys[1], params, batch))
        rows: Supported = ring.sample(keys[2], stored)
        rows = rows._replace(transition=normalized(params.normalizer, rows.transition))
        value = values(state.target_q, rows.transition.observation, rows.support)
        rate = jnp.maximum(config.moment_rate, 1.0 / (state.step + 1.0))
        square = state.value_square + rate * (
            jnp.mean(jnp.var(value, axis=-1)) - state.value_square
        )
        unit = jnp.sqrt(jnp.maximum(square, 1e-12)) if config.normalize_values else 1.0
        new_critics, of_critics = critic_step(state, rows, unit)
        scaled = config.inverse_temperature * value / unit
        new_energy, of_energy = energy_step(keys[3], state, rows, scaled)
        new_state = state._replace(
            behaviour=new_behaviour,
            ring=stored,
            value_square=square,
            **new_critics,
            **new_energy,
        )
        return new_state, {
            "behaviour_loss": learned["loss"],
            **of_critics,
            **of_energy,
            "value_mean": jnp.mean(value),
            "value_spread": jnp.sqrt(square),
        }

    act = guided_act(
        model,
        spec.action_size,
        num_steps=config.behaviour.num_steps,
        scale=config.guidance.scale,
        rescale=config.guidance.rescale,
        bound=config.behaviour.bound,
    )
    return Policy(init, update, act, None)


def _repeated(observation: jax.Array, action: jax.Array) -> jax.Array:
    """``[*batch, obs]`` beside ``[*batch, action, act]``."""
    shape = (*action.shape[:-1], observation.shape[-1])
    return jnp.broadcast_to(observation[..., None, :], shape)
