"""Energies, the Boltzmann law and the log-opinion pool that fuses experts."""

from emfuse_jax.energy.divergence import (
    categorical_js,
    categorical_kl,
    gaussian_geometric_js,
    gaussian_kl,
)
from emfuse_jax.energy.gaussian import (
    Gaussian,
    gaussian_energy,
    gaussian_log_prob,
    pool_gaussians,
)
from emfuse_jax.energy.law import boltzmann_log_prob, energy_from_logits, log_partition
from emfuse_jax.energy.pool import (
    align_weights,
    check_weights,
    log_opinion_pool,
    pool_energies,
    weighted_energy,
)

__all__ = [
    "Gaussian",
    "align_weights",
    "boltzmann_log_prob",
    "categorical_js",
    "categorical_kl",
    "check_weights",
    "energy_from_logits",
    "gaussian_energy",
    "gaussian_geometric_js",
    "gaussian_kl",
    "gaussian_log_prob",
    "log_opinion_pool",
    "log_partition",
    "pool_energies",
    "pool_gaussians",
    "weighted_energy",
]
