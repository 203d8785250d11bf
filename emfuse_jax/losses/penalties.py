"""Penalties that keep an energy smooth and bounded, one number per target, un-reduced."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from emfuse_jax.base import EnergyFn
from emfuse_jax.numerics import safe_sqrt

__all__ = ["energy_magnitude", "gradient_penalty"]


def gradient_penalty(
    energy_fn: EnergyFn,
    targets: Float[Array, "*batch dim"],
    *,
    margin: ArrayLike = 5.0,
    order: int | float = 2,
) -> Float[Array, "*batch"]:
    """``max(0, ‖∂E/∂y‖ - margin)²`` at each target.

    Keeps the energy's slopes within what a clipped chain can follow. Energy transition
    models use the Euclidean norm and margin 5, implicit behavioural cloning the maximum
    norm and margin 1.

    Args:
        energy_fn: ``[*batch, dim] -> [*batch]``, each row for itself.
        targets: where to look, positives and negatives.
        margin: the slope that costs nothing.
        order: 2 for the Euclidean norm, ``jnp.inf`` for the maximum norm.

    Raises:
        ValueError: if the order is another.

    References:
        Florence et al., "Implicit Behavioral Cloning", CoRL 2021, appendix B.3.
        https://arxiv.org/abs/2109.00137
        Chen et al., "Offline Transition Modeling via Contrastive Energy Learning", ICML
        2024.

    Example:
        >>> slope = jnp.array([3.0, 4.0])
        >>> penalty = gradient_penalty(lambda y: y @ slope, jnp.zeros((1, 2)), margin=2.0)
        >>> penalty.tolist()
        [9.0]
    """
    energy, pullback = jax.vjp(energy_fn, targets)
    (gradient,) = pullback(jnp.ones_like(energy))
    if order == 2:
        # A flat energy has norm 0, where the plain root has an infinite gradient.
        norm = safe_sqrt(jnp.sum(jnp.square(gradient), axis=-1))
    elif order == jnp.inf:
        norm = jnp.max(jnp.abs(gradient), axis=-1)
    else:
        raise ValueError(f"order={order}; expected 2 or jnp.inf")
    return jnp.square(jnp.maximum(norm - margin, 0.0))


def energy_magnitude(
    positive_energy: Float[Array, "*batch"],
    negative_energy: Float[Array, "*batch negative"],
) -> Float[Array, "*batch"]:
    """``(E⁺)² + mean_j (E_j⁻)²``, which ties down the constant that contrast leaves free.

    References:
        Du, Mordatch, "Implicit Generation and Modeling with Energy-Based Models", NeurIPS
        2019. https://arxiv.org/abs/1903.08689

    Example:
        >>> float(energy_magnitude(jnp.array(2.0), jnp.array([1.0, 3.0])))
        9.0
    """
    return jnp.square(positive_energy) + jnp.mean(jnp.square(negative_energy), axis=-1)
