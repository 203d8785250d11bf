"""The losses of the two recipes of `dynamics.contrastive`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.base import Metrics
from emfuse_jax.dynamics._energy_model import (
    ContrastiveConfig,
    EnergyParams,
    Forward,
    Rows,
)
from emfuse_jax.losses import (
    chain_negatives,
    gaussian_mixture_log_prob,
    gaussian_mixture_proposal,
    gradient_penalty,
    info_nce,
    ranking_nce,
)
from emfuse_jax.samplers import etm_langevin

LossFn = Callable[[Any, jax.Array, Rows, jax.Array], tuple[jax.Array, Metrics]]
"""``(params, key, rows, step) -> (loss, metrics)``."""


def beta_nll(residual: jax.Array, log_std: jax.Array, beta: float) -> jax.Array:
    """β-NLL per dimension; ``residual`` is ``(y - μ) / σ`` (Seitzer et al., eq. 8).

    Example:
        >>> loss = beta_nll(jnp.zeros(2), jnp.log(jnp.array([0.1, 10.0])), beta=0.5)
        >>> [f"{x:.2f}" for x in loss]  # σ log σ: plain NLL would pay 1/σ² for confidence
        ['-0.23', '23.03']
    """
    nll = 0.5 * jnp.square(residual) + log_std
    return jax.lax.stop_gradient(jnp.exp(2.0 * beta * log_std)) * nll


def proposal_loss(config: ContrastiveConfig, forward: Forward) -> LossFn:
    head_steps = round(config.head_phase * config.num_steps)
    scales = jnp.asarray(config.proposal_scales)

    def nce(
        params: EnergyParams,
        key: jax.Array,
        feature: jax.Array,
        residual: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The mean loss, and by how much the tilt lifts negatives above recorded rows."""
        rows = config.energy_rows
        # The head and the encoder keep to their own loss: chasing the tilt would blunt them.
        feature, residual = jax.lax.stop_gradient((feature[:rows], residual[:rows]))
        zero, one = jnp.zeros_like(residual), jnp.ones_like(residual)
        negative, negative_log_q = gaussian_mixture_proposal(
            key, zero, one, scales, config.num_negatives
        )
        positive_log_q = gaussian_mixture_log_prob(residual, zero, one, scales)
        projected = forward.prepare(params, feature)

        def tilt(target: jax.Array) -> jax.Array:
            return forward.tilt(params, projected, target)

        def energy(tilted: jax.Array, target: jax.Array) -> jax.Array:
            return tilted + 0.5 * jnp.sum(jnp.square(target), axis=-1)

        positive_tilt = tilt(residual)
        negative_tilt = jnp.moveaxis(jax.vmap(tilt)(jnp.moveaxis(negative, 1, 0)), 0, 1)
        losses = ranking_nce(
            energy(positive_tilt, residual),
            energy(negative_tilt, negative),
            positive_log_q,
            negative_log_q,
        )
        return jnp.mean(losses), jnp.mean(negative_tilt) - jnp.mean(positive_tilt)

    def loss(
        params: EnergyParams, key: jax.Array, rows: Rows, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        encoded = forward.encode(params, rows.anchor, rows.action, rows.lags)
        index = jnp.sum(rows.lags, axis=-1) - 1
        log_std = jnp.log(encoded.scale / params.scales.target.scale[index])
        residual = (rows.target - encoded.start) / encoded.scale
        head_loss = jnp.mean(jnp.sum(beta_nll(residual, log_std, config.beta), axis=-1))
        energy_loss, energy_gap = jax.lax.cond(
            step >= head_steps,
            lambda p: nce(p, key, encoded.feature, residual),
            lambda p: (jnp.zeros(()), jnp.zeros(())),
            params,
        )
        return head_loss + energy_loss, {
            "head_loss": head_loss,
            "energy_loss": energy_loss,
            "energy_gap": energy_gap,
            "loss": head_loss + energy_loss,
            "residual_rms": jnp.sqrt(jnp.mean(jnp.square(residual * jnp.exp(log_std)))),
        }

    return loss


def langevin_loss(config: ContrastiveConfig, forward: Forward) -> LossFn:
    def loss(
        params: EnergyParams, key: jax.Array, rows: Rows, step: jax.Array
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
            "energy_gap": jnp.mean(energies[:-1]) - jnp.mean(energies[-1]),
            "gradient_penalty": penalty,
        }

    return loss
