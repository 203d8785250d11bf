"""Energy-based transformer policy: the action is where a short descent of an energy ends.

Training regresses the end of a descent that starts at noise to the recorded action, through
the descent (second derivatives of the energy). There are no negatives and no partition
function, so energies rank actions of one observation; acting spends as many steps as each
row needs, and the energy that is left says how sure the policy is.

A plain regression of ends that start at noise independent of the target learns the
conditional mean: where two actions are right it answers between them. `EbtConfig` offers
starts that are the recorded action under noise of every size (``start_noise=(0, 1)``), with
which the basins stay apart; the authors' recipe is ``start_noise=(1, 1)``.

References:
    Davies et al., "EBT-Policy: Energy Unlocks Emergent Physical Reasoning Capabilities",
    2025, and its public code. https://arxiv.org/abs/2510.27545
    Gladstone et al., "Energy-Based Transformers are Scalable Learners and Thinkers",
    2025, sections 3.3 and 3.4 (S1 and S2). https://arxiv.org/abs/2507.02092
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

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
from emfuse_jax.loops import run_sampler
from emfuse_jax.nets.energy import EnergyNetwork
from emfuse_jax.nets.transformer import (
    EnergyTransformer,
    TransformerConfig,
    energy_transformer,
)
from emfuse_jax.samplers.descent import check_steps, descent, minimize

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EbtConfig:
    """Settings of `ebt_policy`.

    Attributes:
        network: of the transformer, unless a network is passed.
        num_frames: observation frames in an observation, oldest first.
        horizon: actions in a chunk.
        train_steps: fewest steps of a training descent.
        extra_steps: up to this many more, drawn for each batch.
        step_size: of the descent, in the units of an action's coordinate: the energy is
            a mean over ``action_size`` coordinates, so its gradient is multiplied by
            that number too.
        step_size_spread: each row's step size is drawn from ``[η / spread, η · spread]``.
        momentum: Nesterov's, in training and acting.
        detach: no derivative from one step to the one before (S1).
        truncate: score the last step of a descent alone (S2), or all.
        num_starts: training descents per recorded action; the one that ends nearest to it
            is trained on. Ends that are no mixture of modes need more than 1.
        start_noise: range of the noise level ``s`` of a training descent's start,
            ``√(1 - s²) a + s ε`` for the recorded action ``a``; (1, 1) starts at noise.
        noise: standard deviation added before each training step, first and last, on half
            a cosine; (0, 0) adds none.
        normalize: positions by their root mean square: of each sample, of the whole
            ``batch`` (the authors'; one row then changes another's answer), or not.
        energy_scaled: steps in proportion to ``exp(energy)``, the authors'.
        act_steps: most steps of an acting descent.
        tolerance: a row stops acting when its gradient norm is at most this; 0: never.
        num_candidates: descents per action; the one of lowest energy is taken.
        learning_rate: AdamW, after ``warmup_steps`` of linear growth.
        warmup_steps: updates.
        decay_steps: updates until a cosine has brought the rate to 0; none: never.
        weight_decay: AdamW.
        max_gradient_norm: of an update.
        average_power: the moving average of the weights, with which it acts, forgets
            at the rate ``(1 + step)^-power``.
    """

    network: TransformerConfig = TransformerConfig()  # noqa: RUF009
    num_frames: int = 1
    horizon: int = 1
    train_steps: int = 2
    extra_steps: int = 0
    step_size: float = 1.0
    step_size_spread: float = 1.0
    momentum: float = 0.0
    detach: bool = True
    truncate: bool = False
    num_starts: int = 1
    start_noise: tuple[float, float] = (1.0, 1.0)
    noise: tuple[float, float] = (0.2, 0.002)
    normalize: Literal["none", "sample", "batch"] = "none"
    energy_scaled: bool = False
    act_steps: int = 10
    tolerance: float = 0.0
    num_candidates: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_steps: int | None = None
    weight_decay: float = 1e-6
    max_gradient_norm: float = 1.0
    average_power: float = 0.75

    def __post_init__(self) -> None:
        check_steps("train_steps", self.train_steps)
        check_steps("act_steps", self.act_steps)
        for name, least in (
            ("extra_steps", 0),
            ("num_starts", 1),
            ("num_candidates", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least {least}"
                )
        if not (self.step_size > 0 and self.step_size_spread >= 1):
            raise ValueError(
                f"step_size={self.step_size} must be positive and step_size_spread="
                f"{self.step_size_spread} at least 1 (1 draws none)"
            )
        low, high = self.start_noise
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"start_noise={self.start_noise}; expected 0 ≤ low ≤ high ≤ 1"
            )
        if min(self.noise) < 0 or not self.tolerance >= 0:
            raise ValueError(
                f"noise={self.noise} and tolerance={self.tolerance} must be at least 0"
            )
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps={self.decay_steps} must exceed warmup_steps="
                f"{self.warmup_steps}, which it includes"
            )
        # The rest is refused by the descent itself.
        descent(
            lambda x: jnp.sum(x, -1),
            self.step_size,
            momentum=self.momentum,
            normalize=self.normalize,
        )


def s1_config(**settings: Any) -> EbtConfig:
    """S1 of energy-based transformers: one derivative per step, every step scored.

    Example:
        >>> s1_config(train_steps=3).detach
        True
    """
    defaults = {"detach": True, "truncate": False, "start_noise": (1.0, 1.0)}
    return EbtConfig(**{**defaults, **settings})


def s2_config(**settings: Any) -> EbtConfig:
    """S2: derivatives through the whole descent, its end scored, steps and sizes random.

    Example:
        >>> s2_config().step_size_spread
        2.0
    """
    defaults = {
        "detach": False,
        "truncate": True,
        "start_noise": (1.0, 1.0),
        "train_steps": 2,
        "extra_steps": 1,
        "step_size_spread": 2.0,
    }
    return EbtConfig(**{**defaults, **settings})


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
    """
    network = _default_network(config, spec) if network is None else network
    refine = ebt_refine(config, spec, network=network)
    optimizer = _optimizer(config)

    def init(key: jax.Array, *, normalizer: Normalizer | None = None) -> EbtState:
        size = spec.observation_size
        if normalizer is None:
            normalizer = Normalizer(jnp.zeros(size), jnp.ones(size))
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
        metrics |= {"loss": loss, "update_norm": optax.global_norm(gradient)}
        return EbtState(params, weights, new, state.step + 1), metrics

    def act(
        params: EbtParams,
        key: jax.Array,
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
    """
    network = _default_network(config, spec) if network is None else network
    num_candidates = config.num_candidates

    def refine(
        params: EbtParams,
        key: jax.Array,
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
            key = jax.random.key(0)
            one = jax.random.normal(key, (num_candidates, spec.action_size))
            ones = (1,) * (observation.ndim - 1)
            start = one.reshape(num_candidates, *ones, spec.action_size)
            start = jnp.broadcast_to(start, shape)
        else:
            start = jax.random.normal(key, shape)
        energy_fn = _bind(network, params.network, normal, num_candidates)
        end = minimize(
            key,
            energy_fn,
            _sampler(config, energy_fn, config.step_size, spec.action_size),
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


def descent_loss(
    key: jax.Array,
    energy_fn: EnergyFn,
    action: Float[Array, "*batch act"],
    config: EbtConfig,
) -> tuple[Float[Array, "*batch"], Metrics]:
    """Squared error of the positions of a training descent, mean over coordinates.

    Args:
        key: draws start, number of steps, step sizes and noise.
        energy_fn: of the batch's observations.
        action: the recorded ones, where the descent should end.
        config: see `EbtConfig`.

    Returns:
        The loss of each row, and means over rows: ``energy`` of the recorded action,
        ``energy_drop`` from the first step's to the last's, ``rise_rate``, the share of
        rows whose energy rose (steps too long), and ``gradient_norm`` of the last step.
    """
    key_start, key_count, key_size, key_noise = jax.random.split(key, 4)
    batch = action.shape[:-1]
    start = _training_start(key_start, energy_fn, action, config)
    count = config.train_steps
    if config.extra_steps:
        count += jax.random.randint(key_count, (), 0, config.extra_steps + 1)
    size: Any = config.step_size
    if config.step_size_spread > 1.0:
        spread = config.step_size_spread
        low, high = config.step_size / spread, config.step_size * spread
        size = jax.random.uniform(key_size, batch, minval=low, maxval=high)
    sampler = _sampler(config, energy_fn, size, action.shape[-1], count)
    most = config.train_steps + config.extra_steps
    _, (position, info) = run_sampler(
        key_noise, sampler, start, most, keep=lambda state, info: (state.position, info)
    )
    step = jnp.arange(most).reshape((most,) + (1,) * len(batch))
    scored = step == count - 1 if config.truncate else step < count
    error = jnp.mean(jnp.square(position - action[None]), axis=-1)
    weight = jnp.where(scored, 1.0 if config.truncate else 1.0 / count, 0.0)
    loss = jnp.sum(jnp.where(scored, weight * error, 0.0), axis=0)
    last = energy_fn(position[count - 1])
    metrics = {
        "energy": jnp.mean(energy_fn(action)),
        "energy_drop": jnp.mean(info.energy[0] - last),
        "rise_rate": jnp.mean(last > info.energy[0]),
        "gradient_norm": jnp.mean(info.gradient_norm[count - 1]),
    }
    return loss, jax.lax.stop_gradient(metrics)


def _training_start(
    key: jax.Array, energy_fn: EnergyFn, action: jax.Array, config: EbtConfig
) -> Float[Array, "*batch act"]:
    """Of ``num_starts`` draws, the one whose descent ends nearest to the recorded action.

    The draws compete by their ends, at the nominal step size and without noise; no
    derivative is taken of that.
    """
    key_noise, key_level, key_descent = jax.random.split(key, 3)
    noise = jax.random.normal(key_noise, (config.num_starts, *action.shape))
    low, high = config.start_noise
    if low < 1.0:
        shape = (*noise.shape[:-1], 1)
        level = jax.random.uniform(key_level, shape, minval=low, maxval=high)
        noise = jnp.sqrt(1.0 - jnp.square(level)) * action[None] + level * noise
    if config.num_starts == 1:
        return noise[0]
    sampler = _sampler(config, energy_fn, config.step_size, action.shape[-1])

    def end(start: jax.Array) -> jax.Array:
        return run_sampler(key_descent, sampler, start, config.train_steps)[0].position

    error = jnp.sum(jnp.square(jax.vmap(end)(noise) - action[None]), axis=-1)
    best = jnp.argmin(jax.lax.stop_gradient(error), axis=0)
    return jnp.take_along_axis(noise, best[None, ..., None], axis=0)[0]


def _sampler(
    config: EbtConfig,
    energy_fn: EnergyFn,
    step_size: Any,
    action_size: int,
    count: Any = None,
) -> Any:
    """The one descent of training (``count`` steps, noisy) and of acting (None)."""
    schedule = None
    if count is not None and max(config.noise) > 0:
        first, last = config.noise
        schedule = functools.partial(_cosine, first=first, last=last, count=count)
    return descent(
        energy_fn,
        step_size * action_size,
        momentum=config.momentum,
        noise_schedule=schedule,
        normalize=config.normalize,
        energy_scaled=config.energy_scaled,
        detach=config.detach and count is not None,
    )


def _cosine(step: jax.Array, *, first: float, last: float, count: Any) -> jax.Array:
    share = jnp.minimum(step / count, 1.0)
    return last + 0.5 * (first - last) * (1.0 + jnp.cos(jnp.pi * share))


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
