"""Contrastive losses, penalties and negatives, per example and un-reduced."""

from emfuse_jax.losses.contrastive import (
    contrastive_divergence,
    info_nce,
    ranking_nce,
)
from emfuse_jax.losses.negatives import (
    chain_negatives,
    gaussian_mixture_log_prob,
    gaussian_mixture_proposal,
    uniform_negatives,
)
from emfuse_jax.losses.penalties import energy_magnitude, gradient_penalty

__all__ = [
    "chain_negatives",
    "contrastive_divergence",
    "energy_magnitude",
    "gaussian_mixture_log_prob",
    "gaussian_mixture_proposal",
    "gradient_penalty",
    "info_nce",
    "ranking_nce",
    "uniform_negatives",
]
