"""Quadratic energies, and the pool of Gaussians in closed form.

The log-opinion pool of ``N(μ_i, Λ_i⁻¹)`` is the Gaussian of precision
``Λ = Σ_i w_i Λ_i`` and mean ``Λ⁻¹ Σ_i w_i Λ_i μ_i``. All covariances here are diagonal.

References:
    Hinton, "Products of Experts", ICANN 1999. https://doi.org/10.1049/cp:19991075
    Cao, Fleet, "Generalized Product of Experts for Automatic and Principled Fusion of
    Gaussian Process Predictions", 2014. https://arxiv.org/abs/1410.7827
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.base import EnergyFn
from emfuse_jax.energy.pool import align_weights
from emfuse_jax.numerics import multiply_no_nan

__all__ = ["Gaussian", "gaussian_energy", "gaussian_log_prob", "pool_gaussians"]


class Gaussian(NamedTuple):
    """A Gaussian with a diagonal covariance."""

    mean: Float[Array, "*batch dim"]
    variance: Float[Array, "*batch dim"]


def gaussian_energy(gaussian: Gaussian) -> EnergyFn:
    """The quadratic energy ``½ Σ_d (y_d - μ_d)² / σ_d²``, whose minimum is 0.

    Example:
        >>> energy_fn = gaussian_energy(Gaussian(jnp.zeros(2), jnp.full(2, 0.5)))
        >>> float(energy_fn(jnp.ones(2)))
        2.0
    """

    def energy_fn(position: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
        mean = jnp.broadcast_to(gaussian.mean, position.shape)
        variance = jnp.broadcast_to(gaussian.variance, position.shape)
        return 0.5 * jnp.sum(jnp.square(position - mean) / variance, axis=-1)

    return energy_fn


def gaussian_log_prob(
    gaussian: Gaussian, position: Float[Array, "*batch dim"]
) -> Float[Array, "*batch"]:
    """``log N(y; μ, diag σ²)``; the Gaussian's leading axes are broadcast.

    Example:
        >>> unit = Gaussian(jnp.zeros(1), jnp.ones(1))
        >>> print(f"{gaussian_log_prob(unit, jnp.zeros(1)):.4f}")
        -0.9189
    """
    variance = jnp.broadcast_to(gaussian.variance, position.shape)
    log_norm = 0.5 * jnp.sum(jnp.log(2 * jnp.pi * variance), axis=-1)
    return -gaussian_energy(gaussian)(position) - log_norm


def pool_gaussians(
    mean: Float[Array, "model *batch dim"],
    variance: Float[Array, "model *batch dim"],
    weights: Float[Array, "model *#weighted"],
) -> Gaussian:
    """The log-opinion pool of diagonal Gaussians, which is a diagonal Gaussian.

    Args:
        mean: of each expert.
        variance: of each expert, positive.
        weights: ``[model]`` or ``[model, *batch]``, of positive sum.

    Raises:
        ValueError: if the weights fit neither shape.

    Example:
        >>> mean, variance = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [3.0]])
        >>> pooled = pool_gaussians(mean, variance, jnp.array([0.5, 0.5]))
        >>> float(pooled.mean[0]), float(pooled.variance[0])
        (0.25, 1.5)
    """
    weights = align_weights(weights, mean.shape[:-1])[..., None]
    precisions = multiply_no_nan(weights, 1.0 / variance)
    precision = jnp.sum(precisions, axis=0)
    weighted_mean = jnp.sum(multiply_no_nan(precisions, mean), axis=0)
    return Gaussian(weighted_mean / precision, 1.0 / precision)
