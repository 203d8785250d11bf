"""Energy-based dynamics over any slice encoder: the training that ETM and ADETM share.

Two recipes give the negatives:

``langevin`` (the papers'): InfoNCE against Langevin chains of the model itself, with a
gradient penalty. The energy lives in the box of the data.

``proposal`` (ours): ranking NCE against a known density, a scale mixture around a Gaussian
head that is trained first by β-NLL. No chains in training, and the energy is consistent for
``-log p(y | x)`` up to ``c(x)``. The energy is the head's own quadratic plus a learned tilt,
``E = -log N(y; μ, σ) + f(feature, asinh((y - μ) / σ))``: the tilt starts near 0, so that
the energy never has to relearn what the head knows, and ``asinh`` keeps far residuals in
range.

References:
    Chen et al., "Offline transition modeling via contrastive energy learning", ICML 2024
    (ETM: the loss, the schedule and the penalty).
    Seitzer et al., "On the pitfalls of heteroscedastic uncertainty estimation with
    probabilistic neural networks", ICLR 2022 (β-NLL).
    Ma and Collins, "Noise contrastive estimation and negative sampling for conditional
    models", EMNLP 2018 (ranking NCE).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from emfuse_jax.base import Dynamics, Metrics, Network, Params, SpaceSpec
from emfuse_jax.data.normalizer import apply as normalize
from emfuse_jax.dynamics.base import (
    Anchor,
    Batch,
    Encoded,
    Expert,
    Scales,
    Slices,
    make_slices,
    newest_lags,
    pack_target,
    pick_slice,
)
from emfuse_jax.dynamics.fused import ETM_SAMPLING, SamplingConfig, transition_model
from emfuse_jax.losses import (
    chain_negatives,
    gaussian_mixture_log_prob,
    gaussian_mixture_proposal,
    gradient_penalty,
    info_nce,
    ranking_nce,
)
from emfuse_jax.nets.energy import conditional_energy
from emfuse_jax.nets.mlp import mlp
from emfuse_jax.samplers import etm_langevin


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


class ContrastiveState(NamedTuple):
    params: ContrastiveParams
    optimizer: optax.OptState
    step: jax.Array


LOG_STD_BOUNDS = (-9.0, 2.0)
"""Of the head, in units of the targets' standard deviation; approached smoothly."""


def contrastive_dynamics(
    encoder: Network,
    config: ContrastiveConfig,
    spec: SpaceSpec,
    *,
    num_lags: int,
    anchor: Anchor,
    feature_size: int,
) -> Dynamics:
    """An energy-based dynamics model.

    Args:
        encoder: ``apply(params, anchor, action, lags) -> feature``, normalised inputs.
        config: the recipe.
        spec: sizes of the spaces.
        num_lags: slices of the history that the model reads.
        anchor: what a slice starts from.
        feature_size: width of the encoder's output.

    Returns:
        ``Dynamics``: ``init(key, scales) -> state``, ``update(key, state, Batch)``.
    """
    expert, forward = _expert(encoder, config, spec, num_lags, anchor, feature_size)
    loss_fn = (_proposal_loss if config.negatives == "proposal" else _langevin_loss)(
        config, forward
    )
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.adam(schedule)
    )

    def init(key: jax.Array, scales: Scales) -> ContrastiveState:
        params = forward.init(key, scales)
        return ContrastiveState(
            params, optimizer.init(params[1:]), jnp.zeros((), jnp.int32)
        )

    def update(
        key: jax.Array, state: ContrastiveState, batch: Batch
    ) -> tuple[ContrastiveState, Metrics]:
        key_slice, key_loss = jax.random.split(key)
        batch = batch._replace(history=newest_lags(batch.history, num_lags))
        rows = training_rows(key_slice, batch, anchor, config.newest_probability)

        def objective(trained: tuple[Params, ...]) -> tuple[jax.Array, Metrics]:
            params = ContrastiveParams(state.params.scales, *trained)
            return loss_fn(params, key_loss, rows, state.step)

        grads, metrics = jax.grad(objective, has_aux=True)(tuple(state.params[1:]))
        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, tuple(state.params[1:])
        )
        trained: Any = optax.apply_updates(tuple(state.params[1:]), updates)
        params = ContrastiveParams(state.params.scales, *trained)
        return ContrastiveState(params, optimizer_state, state.step + 1), metrics

    return Dynamics(init, update, transition_model(expert, config.resolved_sampling))


class Rows(NamedTuple):
    """One slice per example: what an encoder reads, and the target in raw units."""

    anchor: Float[Array, "batch obs"]
    action: Float[Array, "batch lag act"]
    lags: Bool[Array, "batch lag"]
    target: Float[Array, "batch dim"]


def training_rows(
    key: jax.Array, batch: Batch, anchor: Anchor, newest_probability: float
) -> Rows:
    """Draws a slice length for every row by itself (one for the whole batch would
    correlate its gradients) among those that its history allows. The key is consumed."""
    slices = make_slices(batch.history, anchor)
    num_lags = slices.valid.shape[0]
    share = jnp.full((num_lags,), (1.0 - newest_probability) / max(num_lags - 1, 1))
    logits = jnp.log(share.at[0].set(newest_probability if num_lags > 1 else 1.0))
    logits = jnp.where(slices.valid.T, logits[None], -jnp.inf)
    index = jax.random.categorical(key, logits)
    start, lags = pick_slice((slices.anchor, slices.lags), index)
    return Rows(
        start,
        slices.action,
        lags,
        pack_target(start, batch.next_observation, batch.reward),
    )


class _Forward(NamedTuple):
    init: Callable[..., ContrastiveParams]
    encode: Callable[[ContrastiveParams, jax.Array, jax.Array, jax.Array], Encoded]
    head: Callable[[ContrastiveParams, jax.Array], tuple[jax.Array, jax.Array]]
    prepare: Callable[[ContrastiveParams, jax.Array], jax.Array]
    tilt: Callable[[ContrastiveParams, jax.Array, jax.Array], jax.Array]


def _expert(
    encoder: Network,
    config: ContrastiveConfig,
    spec: SpaceSpec,
    num_lags: int,
    anchor: Anchor,
    feature_size: int,
) -> tuple[Expert, _Forward]:
    """The model's functions: as an `Expert` for its users, as `_Forward` for its loss."""
    dim = spec.observation_size + 1
    with_head = config.negatives == "proposal"
    head_net = mlp(2 * dim, config.head_sizes, activation=jax.nn.silu)
    activation = jax.nn.silu if with_head else jax.nn.relu
    energy_net = conditional_energy(config.energy_sizes, activation=activation)

    def init(key: jax.Array, scales: Scales) -> ContrastiveParams:
        _check_scales(scales, spec, num_lags)
        # A copy: the caller keeps its scales when a training loop donates the state.
        scales = jax.tree.map(jnp.array, scales)
        key_encoder, key_head, key_energy = jax.random.split(key, 3)
        example = (
            jnp.zeros((1, spec.observation_size)),
            jnp.zeros((1, num_lags, spec.action_size)),
            jnp.ones((1, num_lags), bool),
        )
        encoder_params = encoder.init(key_encoder, *example)
        feature = encoder.apply(encoder_params, *example)
        head = head_net.init(key_head, feature) if with_head else {}
        return ContrastiveParams(
            scales,
            encoder_params,
            head,
            energy_net.init(key_energy, feature, jnp.zeros((1, dim))),
        )

    def head(
        params: ContrastiveParams, feature: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        mean, log_std = jnp.split(head_net.apply(params.head, feature), 2, axis=-1)
        low, high = LOG_STD_BOUNDS
        log_std = high - jax.nn.softplus(high - log_std)
        return mean, low + jax.nn.softplus(log_std - low)

    def features(
        params: ContrastiveParams, start: jax.Array, action: jax.Array, lags: jax.Array
    ) -> jax.Array:
        scales = params.scales
        return encoder.apply(
            params.encoder,
            normalize(scales.observation, start),
            normalize(scales.action, action),
            lags,
        )

    def encode(
        params: ContrastiveParams, start: jax.Array, action: jax.Array, lags: jax.Array
    ) -> Encoded:
        feature = features(params, start, action, lags)
        index = jnp.sum(lags, axis=-1) - 1
        target = jax.tree.map(lambda leaf: leaf[index], params.scales.target)
        if not with_head:
            return Encoded(feature, target.mean, target.scale)
        mean, log_std = head(params, feature)
        return Encoded(
            feature, target.mean + target.scale * mean, target.scale * jnp.exp(log_std)
        )

    def prepare(params: ContrastiveParams, feature: jax.Array) -> jax.Array:
        return energy_net.project(params.energy, feature)

    def tilt(
        params: ContrastiveParams, projected: jax.Array, residual: jax.Array
    ) -> jax.Array:
        inputs = jnp.arcsinh(residual) if with_head else residual
        return energy_net.energy(params.energy, projected, inputs)

    def encode_slices(params: ContrastiveParams, slices: Slices) -> Encoded:
        per_slice = jax.vmap(encode, in_axes=(None, 0, None, 0))
        return per_slice(params, slices.anchor, slices.action, slices.lags)

    def energy(
        params: ContrastiveParams, condition: tuple[jax.Array, ...], target: jax.Array
    ) -> jax.Array:
        projected, start, scale = condition
        residual = (target - start) / scale
        value = tilt(params, projected, residual)
        if with_head:
            value = value + jnp.sum(
                0.5 * jnp.square(residual) + jnp.log(scale), axis=-1
            )
        return value

    expert = Expert(
        encode=encode_slices,
        prepare=lambda params, encoded: (
            prepare(params, encoded.feature),
            encoded.start,
            encoded.scale,
        ),
        energy=energy,
        unit=lambda params: params.scales.target.scale[0, :-1],
        num_lags=num_lags,
        anchor=anchor,
        region="trust" if with_head else "box",
        feature_size=feature_size,
    )
    return expert, _Forward(init, encode, head, prepare, tilt)


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


LossFn = Callable[
    [ContrastiveParams, jax.Array, Rows, jax.Array], tuple[jax.Array, Metrics]
]


def beta_nll(residual: jax.Array, log_std: jax.Array, beta: float) -> jax.Array:
    """β-NLL per dimension; ``residual`` is ``(y - μ) / σ`` (Seitzer et al., eq. 8)."""
    nll = 0.5 * jnp.square(residual) + log_std
    return jax.lax.stop_gradient(jnp.exp(2.0 * beta * log_std)) * nll


def _proposal_loss(config: ContrastiveConfig, forward: _Forward) -> LossFn:
    head_steps = round(config.head_phase * config.num_steps)
    scales = jnp.asarray(config.proposal_scales)

    def nce(
        params: ContrastiveParams,
        key: jax.Array,
        feature: jax.Array,
        residual: jax.Array,
    ) -> jax.Array:
        rows = config.energy_rows
        # The head and the encoder keep to their own loss: chasing the tilt would blunt them.
        feature, residual = jax.lax.stop_gradient((feature[:rows], residual[:rows]))
        zero, one = jnp.zeros_like(residual), jnp.ones_like(residual)
        negative, negative_log_q = gaussian_mixture_proposal(
            key, zero, one, scales, config.num_negatives
        )
        positive_log_q = gaussian_mixture_log_prob(residual, zero, one, scales)
        projected = forward.prepare(params, feature)

        def energy(target: jax.Array) -> jax.Array:
            return forward.tilt(params, projected, target) + 0.5 * jnp.sum(
                jnp.square(target), axis=-1
            )

        negative_energy = jnp.moveaxis(
            jax.vmap(energy)(jnp.moveaxis(negative, 1, 0)), 0, 1
        )
        return ranking_nce(
            energy(residual),
            negative_energy,
            positive_log_q,
            negative_log_q,
        )

    def loss(
        params: ContrastiveParams, key: jax.Array, rows: Rows, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        encoded = forward.encode(params, rows.anchor, rows.action, rows.lags)
        index = jnp.sum(rows.lags, axis=-1) - 1
        log_std = jnp.log(encoded.scale / params.scales.target.scale[index])
        residual = (rows.target - encoded.start) / encoded.scale
        head_loss = jnp.mean(jnp.sum(beta_nll(residual, log_std, config.beta), axis=-1))
        energy_loss = jax.lax.cond(
            step >= head_steps,
            lambda p: jnp.mean(nce(p, key, encoded.feature, residual)),
            lambda p: jnp.zeros(()),
            params,
        )
        return head_loss + energy_loss, {
            "head_loss": head_loss,
            "energy_loss": energy_loss,
            "loss": head_loss + energy_loss,
            "residual_rms": jnp.sqrt(jnp.mean(jnp.square(residual * jnp.exp(log_std)))),
        }

    return loss


def _langevin_loss(config: ContrastiveConfig, forward: _Forward) -> LossFn:
    def loss(
        params: ContrastiveParams, key: jax.Array, rows: Rows, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del step
        key_start, key_chain = jax.random.split(key)
        encoded = forward.encode(params, rows.anchor, rows.action, rows.lags)
        positive = (rows.target - encoded.start) / encoded.scale
        projected = forward.prepare(params, encoded.feature)[None]

        def energy(
            target: Float[Array, "candidate batch dim"],
        ) -> Float[Array, "candidate batch"]:
            return forward.tilt(params, projected, target)

        sampler = etm_langevin(
            lambda y: forward.tilt(*jax.lax.stop_gradient((params, projected)), y),
            config.chain_steps,
            noise=config.chain_noise,
            drift_clip=config.drift_clip,
            step_clip=config.step_clip,
            bounds=(-config.chain_margin, config.chain_margin),
        )
        shape = (config.num_negatives, *positive.shape)
        initial = jax.random.uniform(key_start, shape, minval=-1.0, maxval=1.0)
        negative = chain_negatives(key_chain, sampler, initial, config.chain_steps)
        targets = jnp.concatenate([negative, positive[None]])
        energies = energy(targets)
        contrast = jnp.mean(info_nce(energies[-1], energies[:-1].T))
        penalty = jnp.mean(
            gradient_penalty(energy, targets, margin=config.penalty_margin)
        )
        return contrast + penalty, {
            "loss": contrast + penalty,
            "energy_loss": contrast,
            "gradient_penalty": penalty,
        }

    return loss
