"""What an energy-based dynamics model is made of: its settings, parameters and functions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emfuse_jax.base import Network, Params, SpaceSpec
from emfuse_jax.data.normalizer import apply as normalize
from emfuse_jax.dynamics.base import Anchor, Encoded, Expert, Scales, Slices
from emfuse_jax.dynamics.sampling import ETM_SAMPLING, SamplingConfig
from emfuse_jax.nets.energy import EnergyNetwork, conditional_energy
from emfuse_jax.nets.mlp import mlp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Training of an energy-based dynamics model; the defaults are the ``fast`` recipe.

    Attributes:
        negatives: where negatives come from.
        energy_sizes: hidden layers of the energy.
        num_negatives: negatives per positive.
        learning_rate: Adam's, decayed by a cosine to 0 over ``num_steps``.
        weight_decay: L2 added to the gradient, as in coupled Adam.
        num_steps: updates in all: the horizon of the decay and of the head's own
            phase.
        batch_size: rows per update.
        newest_probability: share of rows trained on the newest slice; the others
            share the rest.
        head_sizes: proposal: hidden layers of the Gaussian head.
        head_phase: proposal: part of ``num_steps`` in which the head trains alone.
        beta: proposal: β of β-NLL; 0 is the plain likelihood, 1 is close to squared
            error.
        proposal_scales: proposal: standard deviations of the negatives, in units of
            the head's.
        energy_rows: proposal: rows of the batch that train the energy.
        chain_steps: langevin: steps of a training chain.
        chain_noise: langevin: noise of a training chain, multiplied by its step
            size.
        drift_clip: langevin: largest gradient component.
        step_clip: langevin: largest step component, in box units.
        penalty_margin: langevin: gradient norms above this are penalised.
        chain_margin: langevin: chains keep within this many boxes of the data.
        sampling: how predictions are found on the energy; None is what fits the
            negatives: a few steps near the proposal, or the published chain through
            the box.
    """

    negatives: Literal["proposal", "langevin"] = "proposal"
    energy_sizes: tuple[int, ...] = (128, 128)
    num_negatives: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    num_steps: int = 20_000
    batch_size: int = 256
    newest_probability: float = 0.5
    head_sizes: tuple[int, ...] = (192, 192)
    head_phase: float = 0.6
    beta: float = 0.5
    proposal_scales: tuple[float, ...] = (1.0, 3.0, 8.0)
    energy_rows: int = 64
    chain_steps: int = 50
    chain_noise: float = 0.5
    drift_clip: float = 10.0
    step_clip: float = 0.5
    penalty_margin: float = 5.0
    chain_margin: float = 1.1
    sampling: SamplingConfig | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.newest_probability <= 1.0:
            raise ValueError(
                f"newest_probability={self.newest_probability} must be in (0, 1]"
            )
        if not 0.0 <= self.head_phase <= 1.0:
            raise ValueError(f"head_phase={self.head_phase} must be in [0, 1]")
        if self.negatives == "proposal" and self.energy_rows > self.batch_size:
            raise ValueError(
                f"energy_rows={self.energy_rows} exceeds batch_size={self.batch_size}; lower it"
            )

    @property
    def resolved_sampling(self) -> SamplingConfig:
        """``sampling``, or the default that fits the negatives."""
        fitting = SamplingConfig() if self.negatives == "proposal" else ETM_SAMPLING
        return self.sampling or fitting

    @property
    def target_scale(self) -> Literal["standard", "box"]:
        """The scaler that fits the recipe, for `fit_scales`."""
        return "standard" if self.negatives == "proposal" else "box"


class ContrastiveParams(NamedTuple):
    """``scales`` are measured, the rest is trained; no proposal, no ``head``."""

    scales: Scales
    encoder: Params
    head: Params
    energy: Params


class McetmParams(NamedTuple):
    """`ContrastiveParams`, and the autoencoder of scaled targets."""

    scales: Scales
    encoder: Params
    head: Params
    energy: Params
    autoencoder: Params


EnergyParams: TypeAlias = ContrastiveParams | McetmParams
"""What an energy can be evaluated with."""


LOG_STD_BOUNDS = (-9.0, 2.0)
"""Of the head, in units of the targets' standard deviation; approached smoothly."""


class Rows(NamedTuple):
    """One slice per example: what an encoder reads, and the target in raw units."""

    anchor: Float[Array, "batch obs"]
    action: Float[Array, "batch lag act"]
    lags: Bool[Array, "batch lag"]
    target: Float[Array, "batch dim"]


class Forward(NamedTuple):
    """The functions of a model that its loss is made of."""

    init: Callable[..., ContrastiveParams]
    encode: Callable[[EnergyParams, jax.Array, jax.Array, jax.Array], Encoded]
    prepare: Callable[[EnergyParams, jax.Array], jax.Array]
    tilt: Callable[[EnergyParams, jax.Array, jax.Array], jax.Array]


def energy_expert(
    encoder: Network,
    config: ContrastiveConfig,
    spec: SpaceSpec,
    num_lags: int,
    anchor: Anchor,
    feature_size: int,
) -> tuple[Expert, Forward]:
    """The model's functions: as an `Expert` for its users, as `Forward` for its loss."""
    with_head = config.negatives == "proposal"
    activation = jax.nn.silu if with_head else jax.nn.relu
    dim = spec.observation_size + 1
    nets = _Networks(
        encoder,
        mlp(2 * dim, config.head_sizes, activation=activation) if with_head else None,
        conditional_energy(config.energy_sizes, activation=activation),
    )
    forward = Forward(
        init=functools.partial(_init, nets, spec, num_lags),
        encode=functools.partial(_encode, nets),
        prepare=lambda params, feature: nets.energy.project(params.energy, feature),
        tilt=functools.partial(_tilt, nets),
    )

    def encode_slices(params: EnergyParams, slices: Slices) -> Encoded:
        per_slice = jax.vmap(forward.encode, in_axes=(None, 0, None, 0))
        return per_slice(params, slices.anchor, slices.action, slices.lags)

    expert = Expert(
        encode=encode_slices,
        prepare=lambda params, encoded: (
            forward.prepare(params, encoded.feature),
            encoded.start,
            encoded.scale,
        ),
        energy=functools.partial(_energy, nets),
        unit=lambda params: params.scales.target.scale[0, :-1],
        num_lags=num_lags,
        anchor=anchor,
        region="trust" if with_head else "box",
        feature_size=feature_size,
    )
    return expert, forward


def mean_and_log_std(
    outputs: Float[Array, "*batch twice_dim"],
) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch dim"]]:
    """What a Gaussian head's outputs mean; the second half is kept in `LOG_STD_BOUNDS`.

    Example:
        >>> mean, log_std = mean_and_log_std(jnp.array([3.0, 100.0]))
        >>> f"{mean[0]:.3f} {log_std[0]:.3f}"
        '3.000 2.000'
    """
    mean, log_std = jnp.split(outputs, 2, axis=-1)
    low, high = LOG_STD_BOUNDS
    log_std = high - jax.nn.softplus(high - log_std)
    return mean, low + jax.nn.softplus(log_std - low)


class _Networks(NamedTuple):
    """``head`` is the proposal's, None where there is none."""

    encoder: Network
    head: Network | None
    energy: EnergyNetwork


def _init(
    nets: _Networks, spec: SpaceSpec, num_lags: int, key: jax.Array, scales: Scales
) -> ContrastiveParams:
    _check_scales(scales, spec, num_lags)
    # A copy: the caller keeps its scales when a training loop donates the state.
    scales = jax.tree.map(jnp.array, scales)
    key_encoder, key_head, key_energy = jax.random.split(key, 3)
    example = (
        jnp.zeros((1, spec.observation_size)),
        jnp.zeros((1, num_lags, spec.action_size)),
        jnp.ones((1, num_lags), bool),
    )
    encoder = nets.encoder.init(key_encoder, *example)
    feature = nets.encoder.apply(encoder, *example)
    target = jnp.zeros((1, spec.observation_size + 1))
    return ContrastiveParams(
        scales,
        encoder,
        {} if nets.head is None else nets.head.init(key_head, feature),
        nets.energy.init(key_energy, feature, target),
    )


def _encode(
    nets: _Networks,
    params: EnergyParams,
    start: jax.Array,
    action: jax.Array,
    lags: jax.Array,
) -> Encoded:
    scales = params.scales
    feature = nets.encoder.apply(
        params.encoder,
        normalize(scales.observation, start),
        normalize(scales.action, action),
        lags,
    )
    index = jnp.sum(lags, axis=-1) - 1
    target = jax.tree.map(lambda leaf: leaf[index], scales.target)
    if nets.head is None:
        return Encoded(feature, target.mean, target.scale)
    mean, log_std = mean_and_log_std(nets.head.apply(params.head, feature))
    return Encoded(
        feature, target.mean + target.scale * mean, target.scale * jnp.exp(log_std)
    )


def _tilt(
    nets: _Networks, params: EnergyParams, projected: jax.Array, residual: jax.Array
) -> jax.Array:
    inputs = residual if nets.head is None else jnp.arcsinh(residual)
    return nets.energy.energy(params.energy, projected, inputs)


def _energy(
    nets: _Networks,
    params: EnergyParams,
    condition: tuple[jax.Array, ...],
    target: jax.Array,
) -> jax.Array:
    projected, start, scale = condition
    residual = (target - start) / scale
    value = _tilt(nets, params, projected, residual)
    if nets.head is None:
        return value
    return value + jnp.sum(0.5 * jnp.square(residual) + jnp.log(scale), axis=-1)


def _check_scales(scales: Scales, spec: SpaceSpec, num_lags: int) -> None:
    expected = (num_lags, spec.observation_size + 1)
    if scales.target.scale.shape != expected:
        raise ValueError(
            f"scales are for [slices, obs + 1] = {scales.target.scale.shape}, the model needs "
            f"{expected}; measure them with fit_scales(dataset, num_lags={num_lags})"
        )
    if scales.action.scale.shape != (spec.action_size,):
        raise ValueError(
            f"scales are for {scales.action.scale.shape[0]} actions, the model has "
            f"{spec.action_size}; measure them on its data with fit_scales"
        )
