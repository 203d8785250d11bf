"""The terms that MC-ETM adds to an energy's own loss: see `dynamics.mcetm`."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.base import EnergyFn, Metrics, Params
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.data.normalizer import apply as normalize
from emfuse_jax.dynamics._energy_losses import LossFn
from emfuse_jax.dynamics._energy_model import Forward, McetmParams, Rows
from emfuse_jax.dynamics.base import Encoded, Scales
from emfuse_jax.losses import (
    chain_negatives,
    contrastive_divergence,
    energy_magnitude,
    info_nce,
)
from emfuse_jax.nets.autoencoder import Autoencoder
from emfuse_jax.samplers import ula

if TYPE_CHECKING:
    from emfuse_jax.dynamics.mcetm import McetmConfig

DRIFT_CLIP = 10.0
"""Largest gradient component of both chains, as in ETM's training chain."""


class Negatives(NamedTuple):
    """What the two chains ended at, in scaled targets ``[*batch, dim]``.

    ``decoded`` lies on the decoder's surface, ``visible`` near it.
    """

    decoded: Float[Array, "*batch dim"]
    visible: Float[Array, "*batch dim"]


def manifold_negatives(
    key: jax.Array,
    coder: Autoencoder,
    params: Params,
    energy_fn: EnergyFn,
    target: Float[Array, "*batch dim"],
    config: "McetmConfig",
) -> Negatives:
    """Perturbs the codes of targets, runs Langevin on the code, decodes, and runs a short
    chain on what was decoded. Gradients are stopped.

    Both chains follow the energy without a temperature of their own: calibrated noise
    ``√(2h)``, so that what they end at is drawn from near the energy's law.

    Args:
        key: consumed.
        coder: the autoencoder, with its parameters.
        params: the autoencoder's.
        energy_fn: of scaled targets, given the row's condition.
        target: observed targets, scaled.
        config: widths, steps and clips.

    References:
        Yoon et al., "Energy-based models for anomaly detection: a manifold diffusion
        recovery approach", NeurIPS 2023 (MPDR). https://arxiv.org/abs/2310.18677
    """
    key_width, key_noise, key_latent, key_visible = jax.random.split(key, 4)
    low, high = config.code_noise
    code = coder.encode(params, target)
    width = jax.random.uniform(
        key_width, (*code.shape[:-1], 1), minval=low, maxval=high
    )
    start = code + width * jax.random.normal(key_noise, code.shape)
    latent = ula(
        lambda z: energy_fn(coder.decode(params, z)),
        config.latent_step,
        drift_clip=DRIFT_CLIP,
        bounds=(-1.0, 1.0),
    )
    code = chain_negatives(
        key_latent, latent, jnp.clip(start, -1.0, 1.0), config.latent_steps
    )
    decoded = jax.lax.stop_gradient(coder.decode(params, code))
    visible = ula(energy_fn, config.visible_step, drift_clip=DRIFT_CLIP)
    return Negatives(
        decoded, chain_negatives(key_visible, visible, decoded, config.visible_steps)
    )


class Parts(NamedTuple):
    """What the terms are made of."""

    config: "McetmConfig"
    forward: Forward
    coder: Autoencoder

    @property
    def with_head(self) -> bool:
        """Whether residuals are those of a Gaussian head."""
        return self.config.negatives == "proposal"

    def quadratic(self, residual: jax.Array) -> jax.Array:
        """The head's own part of the energy."""
        half = 0.5 * jnp.sum(jnp.square(residual), axis=-1)
        return half if self.with_head else jnp.zeros_like(half)

    def encode(self, params: Any, rows: Rows) -> Encoded:
        """What the energy reads of each row's state and action."""
        return self.forward.encode(params, rows.anchor, rows.action, rows.lags)

    def tilt(
        self, params: Params, feature: jax.Array, residual: jax.Array
    ) -> jax.Array:
        """The learned part of the energy."""
        projected = self.forward.prepare(params, feature)
        return self.forward.tilt(params, projected, residual)

    def scale(self, params: Any, rows: Rows) -> Normalizer:
        """Each row's scaler of targets: that of its slice."""
        index = jnp.sum(rows.lags, axis=-1) - 1
        return jax.tree.map(lambda leaf: leaf[index], params.scales.target)

    def conditional(self, params: Any, encoded: Encoded, scale: Normalizer) -> EnergyFn:
        """The energy of scaled targets, up to each row's constant; the condition is read
        once, however often the energy is evaluated."""
        projected = self.forward.prepare(params, encoded.feature)

        def energy(target: jax.Array) -> jax.Array:
            raw = scale.mean + scale.scale * target
            residual = (raw - encoded.start) / encoded.scale
            tilt = self.forward.tilt(params, projected, residual)
            return self.quadratic(residual) + tilt

        return energy

    def negatives(
        self, params: Any, key: jax.Array, rows: Rows, encoded: Encoded
    ) -> Negatives:
        """`manifold_negatives` of these rows; the key is consumed."""
        params, encoded = jax.lax.stop_gradient((params, encoded))
        scale = self.scale(params, rows)
        return manifold_negatives(
            key,
            self.coder,
            params.autoencoder,
            self.conditional(params, encoded, scale),
            normalize(scale, rows.target),
            self.config,
        )


def manifold_loss(parts: Parts, own_loss: LossFn) -> LossFn:
    """``own_loss``, the autoencoder's reconstruction and the terms of MC-ETM: those of weight
    0 are not computed, except that one of the cross and the magnitude brings the other."""
    config = parts.config
    first = round(config.head_phase * config.num_steps) if parts.with_head else 0

    def terms(
        params: McetmParams, key: jax.Array, rows: Rows
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        key_chain, key_cross = jax.random.split(key)
        encoded = jax.lax.stop_gradient(parts.encode(params, rows))
        residual = (rows.target - encoded.start) / encoded.scale
        positive = parts.tilt(params, encoded.feature, residual)
        cross = magnitude = jnp.zeros(())
        if config.cross_weight or config.magnitude_weight:
            elsewhere = _elsewhere(parts, params, key_cross, rows, residual)
            # The residual is the same on both sides, and so its quadratic drops out.
            here = jnp.broadcast_to(positive[None], elsewhere.shape)
            cross = jnp.mean(info_nce(here, elsewhere[..., None]))
            magnitude = jnp.mean(energy_magnitude(positive, elsewhere.T))
        near = jnp.zeros(())
        if config.manifold_weight:
            own = (positive + parts.quadratic(residual))[: config.manifold_rows]
            few, encoded = jax.tree.map(
                lambda leaf: leaf[: config.manifold_rows], (rows, encoded)
            )
            negative = parts.negatives(params, key_chain, few, encoded).visible
            energy = parts.conditional(params, encoded, parts.scale(params, few))
            energies = energy(negative)
            near = jnp.mean(contrastive_divergence(own, energies[..., None]))
        return near, cross, magnitude

    def loss(
        params: McetmParams, key: jax.Array, rows: Rows, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        key_own, key_code, key_terms = jax.random.split(key, 3)
        own, metrics = own_loss(params, key_own, rows, step)
        some = jax.tree.map(lambda leaf: leaf[: config.energy_rows], rows)
        reconstruction = _reconstruction(parts, params, key_code, some)
        near, cross, magnitude = jax.lax.cond(
            step >= first,
            lambda p: terms(p, key_terms, some),
            lambda p: (jnp.zeros(()),) * 3,
            params,
        )
        total = own + reconstruction + config.manifold_weight * near
        total = total + config.cross_weight * cross
        total = total + config.magnitude_weight * magnitude
        return total, {
            **metrics,
            "loss": total,
            "reconstruction": reconstruction,
            "manifold_loss": near,
            "cross_loss": cross,
            "energy_magnitude": magnitude,
        }

    return loss


def _elsewhere(
    parts: Parts, params: Any, key: jax.Array, rows: Rows, residual: jax.Array
) -> Float[Array, "cross batch"]:
    """The tilt of the same residuals at random neighbours of ``(s, a)``: a symmetric
    move, so that the comparison is consistent for the joint density."""
    moved = perturb(key, rows, params.scales, parts.config)
    feature = jax.lax.stop_gradient(parts.encode(params, moved).feature)
    shape = (*feature.shape[:-1], residual.shape[-1])
    return parts.tilt(params, feature, jnp.broadcast_to(residual[None], shape))


def _reconstruction(
    parts: Parts, params: McetmParams, key: jax.Array, rows: Rows
) -> jax.Array:
    target = normalize(parts.scale(params, rows), rows.target)
    code = parts.coder.encode(params.autoencoder, target)
    code = code + parts.config.code_jitter * jax.random.normal(key, code.shape)
    decoded = parts.coder.decode(params.autoencoder, code)
    return jnp.mean(jnp.square(decoded - target))


def perturb(key: jax.Array, rows: Rows, scales: Scales, config: "McetmConfig") -> Rows:
    """``rows`` at states and actions moved by a scale mixture of normal noise, ``[cross,
    batch, …]``; the width does not depend on where a row is, so the move is symmetric."""
    key_width, key_state, key_action = jax.random.split(key, 3)
    num = config.num_cross
    widths = jnp.asarray(config.cross_scales)
    width = widths[
        jax.random.randint(key_width, (num, rows.anchor.shape[0], 1), 0, len(widths))
    ]

    def move(key: jax.Array, x: jax.Array, scale: jax.Array) -> jax.Array:
        shape = (num, *x.shape)
        own = width.reshape(*width.shape, *(1,) * (x.ndim - 2))
        unit = scale.reshape((1,) * x.ndim + scale.shape)
        return x[None] + own * unit * jax.random.normal(key, shape)

    return Rows(
        move(key_state, rows.anchor, scales.observation.scale),
        move(key_action, rows.action, scales.action.scale),
        jnp.broadcast_to(rows.lags[None], (num, *rows.lags.shape)),
        jnp.broadcast_to(rows.target[None], (num, *rows.target.shape)),
    )
