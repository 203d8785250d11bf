"""How far experts disagree: Kullback–Leibler and Jensen–Shannon divergences, in nats.

References:
    Lin, "Divergence Measures Based on the Shannon Entropy", IEEE Transactions on
    Information Theory 37(1), 1991. https://doi.org/10.1109/18.61115
    Nielsen, "On the Jensen–Shannon Symmetrization of Distances Relying on Abstract
    Means", Entropy 21(5), 2019. https://arxiv.org/abs/1904.04017
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.energy.gaussian import Gaussian, pool_gaussians
from emfuse_jax.energy.pool import align_weights
from emfuse_jax.numerics import multiply_no_nan

__all__ = ["categorical_js", "categorical_kl", "gaussian_geometric_js", "gaussian_kl"]


def categorical_kl(
    log_p: Float[Array, "*batch event"], log_q: Float[Array, "*batch event"]
) -> Float[Array, "*batch"]:
    """``KL(p ‖ q) = Σ p (log p - log q)`` of normalised log-probabilities.

    An event impossible under ``p`` adds nothing; one impossible under ``q`` alone makes
    the divergence ``+inf``.

    Example:
        >>> p, q = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.5, 0.5]))
        >>> print(f"{categorical_kl(p, q):.4f}")
        0.6931
    """
    return jnp.sum(multiply_no_nan(jnp.exp(log_p), log_p - log_q), axis=-1)


def categorical_js(
    log_probs: Float[Array, "model *batch event"],
    weights: Float[Array, "model *#weighted"],
) -> Float[Array, "*batch"]:
    """Weighted Jensen–Shannon divergence ``Σ_i w_i KL(p_i ‖ Σ_j w_j p_j)``.

    Between 0 and the entropy of the weights; Lin 1991, section V.

    Args:
        log_probs: normalised log-probabilities of each expert.
        weights: ``[model]`` or ``[model, *batch]``, summing to one.

    Example:
        >>> certain = jnp.log(jnp.eye(2))
        >>> print(f"{categorical_js(certain, jnp.array([0.5, 0.5])):.4f}")
        0.6931
    """
    weights = align_weights(weights, log_probs.shape[:-1])
    probs = jnp.exp(log_probs)
    mixture = jnp.sum(weights[..., None] * probs, axis=0, keepdims=True)
    log_mixture = jnp.log(jnp.where(mixture > 0, mixture, 1.0))
    divergences = jnp.sum(multiply_no_nan(probs, log_probs - log_mixture), axis=-1)
    return jnp.sum(weights * divergences, axis=0)


def gaussian_kl(p: Gaussian, q: Gaussian) -> Float[Array, "*batch"]:
    """``KL(p ‖ q)`` of diagonal Gaussians, summed over the last axis.

    Example:
        >>> p = Gaussian(jnp.zeros(1), jnp.ones(1))
        >>> float(gaussian_kl(p, Gaussian(jnp.ones(1), jnp.ones(1))))
        0.5
    """
    ratio = p.variance / q.variance
    distance = jnp.square(p.mean - q.mean) / q.variance
    return 0.5 * jnp.sum(ratio + distance - 1.0 - jnp.log(ratio), axis=-1)


def gaussian_geometric_js(
    mean: Float[Array, "model *batch dim"],
    variance: Float[Array, "model *batch dim"],
    weights: Float[Array, "model *#weighted"],
) -> Float[Array, "*batch"]:
    """Geometric Jensen–Shannon divergence ``Σ_i w_i KL(N_i ‖ pool)`` of Gaussians.

    The mixture in the ordinary divergence has no closed form for Gaussians; their
    log-opinion pool, the normalised geometric mean, has one (Nielsen 2019).

    Args:
        mean: of each expert.
        variance: of each expert, positive.
        weights: ``[model]`` or ``[model, *batch]``, summing to one.

    Example:
        >>> mean, variance = jnp.array([[-1.0], [1.0]]), jnp.ones((2, 1))
        >>> float(gaussian_geometric_js(mean, variance, jnp.array([0.5, 0.5])))
        0.5
    """
    pool = pool_gaussians(mean, variance, weights)
    stacked = Gaussian(*(jnp.broadcast_to(leaf, mean.shape) for leaf in pool))
    divergences = gaussian_kl(Gaussian(mean, variance), stacked)
    return jnp.sum(align_weights(weights, mean.shape[:-1]) * divergences, axis=0)
