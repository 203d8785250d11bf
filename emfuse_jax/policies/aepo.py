"""Analytic energy-guided policy optimisation: a diffusion behaviour, guided by IQL's value.

The target is ``π(a|s) ∝ μ(a|s) exp(β Q(s, a))``. Its noise is the behaviour's plus
``σ_t ∇E_t``, where the intermediate energy ``E_t = -log E[exp(β Q(a_0)) | a_t]`` is taken in
closed form (`policies._analytic`) and regressed on by a network whose gradient guides.

All parts learn in one compiled `update`: every one of them is a regression whose target
only moves as long as the parts below it do. Stages by step count would make ``cond`` run
both branches under vmapped seeds and would save nothing.

References:
    "Analytic Energy-Guided Policy Optimization for Offline Reinforcement Learning", 2025.
    https://arxiv.org/abs/2505.01822
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from emfuse_jax._settings import at_least, rates
from emfuse_jax.base import Metrics, Network, Params, Policy, SpaceSpec, Transition
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.policies import _analytic, _vp
from emfuse_jax.policies._analytic import PosteriorMoments
from emfuse_jax.policies._guidance import (
    GuidanceConfig,
    GuidanceState,
    energy_network,
    guidance_step,
    init_guidance,
    normalized,
    tilted_act,
    tilted_model,
)
from emfuse_jax.policies._learning import running_mean
from emfuse_jax.policies.diffusion import (
    DiffusionConfig,
    DiffusionParams,
    DiffusionState,
    GuidedDiffusion,
    diffusion,
    diffusion_model,
    draw_times,
)
from emfuse_jax.policies.iql import IqlCritics, IqlCriticsConfig, iql_critics


@dataclasses.dataclass(frozen=True, kw_only=True)
class AepoConfig:
    """Settings of `aepo`.

    Attributes:
        behaviour: the diffusion model of the recorded actions.
        critics: IQL's critics.
        guidance: the energy network and its use.
        inverse_temperature: ``β``, 0 or more. In units of the advantage's root mean square
            where ``normalize_values``: ``KL(π ‖ μ)`` is then about ``β²/2``, less where the
            advantages have a mean.
        normalize_values: divide values by the running root mean square of ``Q - V`` over
            the data.
        expansion: gradient: the published first-order form. curvature: the exact Gaussian
            integral of the second-order expansion, for critics with curvature (those of
            ReLU have none); the first pushes away from the optimum where ``β |Q''| v > 1``.
        expand_at: data: at the recorded action, where the value is known. posterior_mean:
            at ``E[a_0|a_t]``, less noisy, but between modes at high noise.
        num_bins: of the table of posterior variances over the time.
        moment_rate: of the running means behind that table and the values' scale.
    """

    behaviour: DiffusionConfig = DiffusionConfig()  # noqa: RUF009
    critics: IqlCriticsConfig = IqlCriticsConfig()  # noqa: RUF009
    guidance: GuidanceConfig = GuidanceConfig()  # noqa: RUF009
    inverse_temperature: float = 1.0
    normalize_values: bool = True
    expansion: Literal["gradient", "curvature"] = "gradient"
    expand_at: Literal["data", "posterior_mean"] = "data"
    num_bins: int = 64
    moment_rate: float = 0.003

    def __post_init__(self) -> None:
        if not self.inverse_temperature >= 0.0:
            raise ValueError(
                f"inverse_temperature={self.inverse_temperature}; expected 0 (the "
                "behaviour) or more: a negative one prefers bad actions"
            )
        for name, known in (
            ("expansion", ("gradient", "curvature")),
            ("expand_at", ("data", "posterior_mean")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; expected one of {known}"
                )
        at_least(self, 1, "num_bins")
        rates(self, "moment_rate")


class AepoParams(NamedTuple):
    """``energy`` is the average of the guidance network's weights."""

    behaviour: DiffusionParams
    critics: Any
    energy: Params


class AepoState(NamedTuple):
    """State of `aepo`.

    ``energy`` holds the trained weights of the guidance and ``average`` those that guide;
    ``advantage_square`` is the running mean of ``(Q - V)²``.
    """

    behaviour: DiffusionState
    critics: Any
    energy: Params
    average: Params
    optimizer: optax.OptState
    moments: PosteriorMoments
    advantage_square: jax.Array

    @property
    def params(self) -> AepoParams:
        """What ``act`` and the model take."""
        return AepoParams(self.behaviour.params, self.critics.params, self.average)

    @property
    def step(self) -> jax.Array:
        """Updates so far."""
        return self.behaviour.step


def aepo_model(
    config: AepoConfig, spec: SpaceSpec, *, network: Network | None = None
) -> GuidedDiffusion:
    """Behaviour and guidance as functions of `AepoParams`, to pool with other energies.

    Example:
        >>> model = aepo_model(AepoConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> callable(model.noise) and callable(model.guidance)  # to give to `fuse_policies`
        True
    """
    behaviour = diffusion_model(config.behaviour, spec, network=network)
    return tilted_model(behaviour, energy_network(config.guidance))


def aepo(
    config: AepoConfig,
    spec: SpaceSpec,
    *,
    network: Network | None = None,
    critics: IqlCritics | None = None,
) -> Policy:
    """Analytic energy-guided policy optimisation.

    ``init(key, *, normalizer=None) -> AepoState`` (of observations, for every part);
    ``update(key, state, batch: Transition) -> (state, metrics)`` is one step of the
    behaviour, the critics, the table of variances and the guidance; ``act`` as for
    `diffusion.guided_act`. There is no ``energy`` of clean actions; `aepo_model` has that of
    noisy ones.

    Args:
        config: see `AepoConfig`.
        spec: sizes of the spaces; actions live in [-1, 1] where the behaviour has a bound.
        network: of the behaviour, see `diffusion`.
        critics: in place of IQL's: anything with ``init``, ``update``, ``q`` and ``value``
            of that shape.

    Returns:
        A `Policy` whose state is an `AepoState`.

    Example:
        >>> policy = aepo(AepoConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> state = jax.eval_shape(policy.init, jax.random.key(0))
        >>> action = jax.eval_shape(policy.act, state.params, jax.random.key(0), jnp.zeros((7, 11)))
        >>> action.shape
        (7, 3)
    """
    parts = _Parts(
        behaviour=diffusion(config.behaviour, spec, network=network),
        critics=iql_critics(config.critics, spec) if critics is None else critics,
        model=aepo_model(config, spec, network=network),
    )

    def init(key: jax.Array, *, normalizer: Normalizer | None = None) -> AepoState:
        key_behaviour, key_critics, key_energy = jax.random.split(key, 3)
        energy, average, optimizer = init_guidance(config.guidance, key_energy, spec)
        return AepoState(
            behaviour=parts.behaviour.init(key_behaviour, normalizer=normalizer),
            critics=parts.critics.init(key_critics),
            energy=energy,
            average=average,
            optimizer=optimizer,
            moments=_analytic.init_moments(config.num_bins, spec.action_size),
            advantage_square=jnp.zeros(()),
        )

    def update(
        key: jax.Array, state: AepoState, batch: Transition
    ) -> tuple[AepoState, Metrics]:
        return _update(config, parts, key, state, batch)

    act = tilted_act(parts.model, config.behaviour, config.guidance, spec)
    return Policy(init, update, act, None)


class _Parts(NamedTuple):
    """What `aepo` is made of."""

    behaviour: Policy
    critics: IqlCritics
    model: GuidedDiffusion


def _update(
    config: AepoConfig,
    parts: _Parts,
    key: jax.Array,
    state: AepoState,
    batch: Transition,
) -> tuple[AepoState, Metrics]:
    """One step of every part, each on what the parts before it have become."""
    key_behaviour, key_critics, key_time, key_noise = jax.random.split(key, 4)
    behaviour, learned = parts.behaviour.update(key_behaviour, state.behaviour, batch)
    normal = normalized(behaviour.params.normalizer, batch)
    critics, metrics = parts.critics.update(key_critics, state.critics, normal)

    action = batch.action
    time = draw_times(key_time, action.shape[:-1], config.behaviour.min_time)
    noisy = _vp.diffuse(action, jax.random.normal(key_noise, action.shape), time)
    params = AepoParams(behaviour.params, critics.params, state.average)
    noise = parts.model.noise(params, batch.observation, noisy, time)
    mean = _vp.predicted_action(noisy, noise, time)
    moments = _analytic.update_moments(
        state.moments, action, noise, mean, time, rate=config.moment_rate
    )
    square, target = _target(
        config,
        parts.critics,
        critics.params,
        state,
        normal,
        mean,
        _analytic.variance_at(moments, time),
    )
    network = energy_network(config.guidance)

    def objective(weights: Params) -> jax.Array:
        found = network.apply(weights, noisy, time, normal.observation)
        return jnp.mean(jnp.square(found - target))

    guidance = GuidanceState(state.energy, state.average, state.optimizer)
    guidance, loss = guidance_step(config.guidance, objective, guidance, state.step)
    new_state = AepoState(behaviour, critics, *guidance, moments, square)
    return new_state, {
        **metrics,
        "energy_loss": loss,
        "energy_std": jnp.std(target),
        "behaviour_loss": learned["loss"],
        "advantage_rms": jnp.sqrt(square),
    }


def _target(
    config: AepoConfig,
    critics: IqlCritics,
    values: Any,
    state: AepoState,
    normal: Transition,
    mean: Float[Array, "row act"],
    variance: Float[Array, "row"],
) -> tuple[Float[Array, ""], Float[Array, "row"]]:
    """The mean square of the advantage so far, and ``E_t`` of each row in its units."""
    observation, action = normal.observation, normal.action
    level = critics.value(values, observation)
    advantage = critics.q(values, observation, action) - level
    square = running_mean(
        state.advantage_square,
        jnp.mean(jnp.square(advantage)),
        state.step,
        config.moment_rate,
    )
    unit = jnp.sqrt(jnp.maximum(square, 1e-12)) if config.normalize_values else 1.0
    energy = _energy(
        config,
        lambda point: critics.q(values, observation, point),
        level,
        action if config.expand_at == "data" else mean,
        mean,
        variance,
        config.inverse_temperature / unit,
    )
    return square, jax.lax.stop_gradient(energy)


def _energy(
    config: AepoConfig,
    q: Any,
    value: jax.Array,
    point: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    inverse_temperature: jax.Array | float,
) -> jax.Array:
    """``E_t`` of each row, around ``Q = V(s)``: a constant of each state guides nowhere."""
    if config.behaviour.bound is not None:
        point = jnp.clip(point, -config.behaviour.bound, config.behaviour.bound)
    slope_of = jax.grad(lambda x: jnp.sum(q(x)))
    at, slope = q(point) - value, slope_of(point)
    offset, beta = mean - point, jnp.asarray(inverse_temperature)
    if config.expansion == "gradient":
        return _analytic.first_order_energy(
            at, slope, offset, variance, inverse_temperature=beta
        )
    # Rows do not mix in q, so one tangent per dimension gives all rows' Hessians.
    basis = jnp.eye(point.shape[-1])
    columns = jax.vmap(
        lambda tangent: jax.jvp(
            slope_of, (point,), (jnp.broadcast_to(tangent, point.shape),)
        )[1]
    )(basis)
    hessian = jnp.moveaxis(columns, 0, -1)
    return _analytic.second_order_energy(
        at, slope, hessian, offset, variance, inverse_temperature=beta
    )
