"""Fusing experts: the log-opinion pool, a weighted product of experts.

``E(y) = Σ_i λ_i E_i(y)``, that is ``log p(y) = Σ_i λ_i log p_i(y) - log Z``. With
weights that sum to one it minimises ``Σ_i λ_i KL(q ‖ p_i)`` over ``q`` and is
externally Bayesian: to update the experts by one likelihood and then pool them is to
pool and then update.

An expert of weight 0 has no say, even on events it calls impossible; an expert of
positive weight vetoes those. Neither makes a NaN, in value or in gradient.

Weights need only be non-negative here, since guidance uses sums other than one; where
experts are fused, `check_weights` asks for a sum of one.

References:
    Genest, Zidek, "Combining Probability Distributions: A Critique and an Annotated
    Bibliography", Statistical Science 1(1), 1986. https://doi.org/10.1214/ss/1177013825
    Heskes, "Selecting Weighting Factors in Logarithmic Opinion Pools", NeurIPS 1997.
    Hinton, "Training Products of Experts by Minimizing Contrastive Divergence", Neural
    Computation 14(8), 2002. https://doi.org/10.1162/089976602760128018
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from emfuse_jax.base import EnergyFn
from emfuse_jax.energy.law import boltzmann_log_prob
from emfuse_jax.numerics import multiply_no_nan

__all__ = [
    "align_weights",
    "check_weights",
    "log_opinion_pool",
    "pool_energies",
    "weighted_energy",
]


def log_opinion_pool(
    log_probs: Float[Array, "model *batch event"],
    weights: Float[Array, "model *#weighted"],
    *,
    normalize: bool = True,
) -> Float[Array, "*batch event"]:
    """Pools categorical distributions: ``Σ_i w_i log p_i``, normalised over the events.

    Args:
        log_probs: each expert's log-probabilities; ``-inf`` is an impossible event.
        weights: ``[model]``, or ``[model, *batch]`` where they differ by row.
        normalize: subtract ``log Z``. Where the experts veto every event, all are
            ``-inf``.

    Raises:
        ValueError: if the weights fit neither shape.

    Example:
        >>> probs = jnp.array([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])
        >>> pooled = log_opinion_pool(jnp.log(probs), jnp.array([0.5, 0.5]))
        >>> [f"{p:.2f}" for p in jnp.exp(pooled)]
        ['0.75', '0.25', '0.00']
    """
    weights = align_weights(weights, log_probs.shape[:-1])[..., None]
    energy = weighted_energy(-log_probs, weights)
    return boltzmann_log_prob(energy) if normalize else -energy


def pool_energies(
    energy_fns: Sequence[EnergyFn], weights: Float[Array, "model *#weighted"]
) -> EnergyFn:
    """The energy function ``y -> Σ_i w_i E_i(y)``.

    A weight of 0 shuts its expert's gradient out as well, even where that is NaN.

    Args:
        energy_fns: each maps ``[*batch, dim] -> [*batch]``.
        weights: ``[model]``, or ``[model, *batch]``; may be traced.

    Raises:
        ValueError: if there is not one weight per energy function.

    Example:
        >>> def bowl(center):
        ...     return lambda y: jnp.sum((y - center) ** 2, axis=-1)
        >>> fused = pool_energies([bowl(0.0), bowl(1.0)], jnp.array([0.5, 0.5]))
        >>> float(fused(jnp.array([0.5])))
        0.25
    """
    if not energy_fns or len(energy_fns) != weights.shape[0]:
        raise ValueError(
            f"{len(energy_fns)} energy functions and weights of shape {weights.shape}; "
            "expected at least one function and one weight for each"
        )

    def energy_fn(position: jax.Array) -> jax.Array:
        aligned = align_weights(weights, (len(energy_fns), *position.shape[:-1]))
        energies = []
        for weight, member in zip(aligned, energy_fns, strict=True):
            # `where` on the input drops an absent member's cotangent whatever it is.
            absent = jnp.broadcast_to((weight == 0)[..., None], position.shape)
            stopped = jax.lax.stop_gradient(position)
            energies.append(member(jnp.where(absent, stopped, position)))
        return weighted_energy(jnp.stack(energies), aligned)

    return energy_fn


def weighted_energy(
    energies: Float[Array, "model *batch"], weights: Float[Array, "model *#weighted"]
) -> Float[Array, "*batch"]:
    """``Σ_i w_i E_i`` of values at hand, with ``0 · inf = 0`` and a veto of ``+inf``.

    What `pool_energies` adds up; for experts whose energies come from one batched call.

    Args:
        energies: one row per expert; ``+inf`` is impossible.
        weights: ``[model]`` or ``[model, *batch]`` (axes of size 1 are broadcast).

    Example:
        >>> energies, weights = jnp.array([2.0, jnp.inf]), jnp.array([1.0, 0.0])
        >>> float(weighted_energy(energies, weights))
        2.0
    """
    weights = align_weights(weights, energies.shape)
    total, veto = jnp.zeros_like(energies[0]), jnp.zeros(energies.shape[1:], bool)
    # Member by member: XLA's CPU reduction over a leading axis takes ten times as long.
    for weight, energy in zip(weights, energies, strict=True):
        # The veto is kept apart from the sum: through it the gradient with respect to the
        # weights would be 0 · inf at every impossible event.
        impossible = energy == jnp.inf
        veto |= impossible & (weight > 0)
        total += multiply_no_nan(weight, jnp.where(impossible, 0.0, energy))
    return jnp.where(veto, jnp.inf, total)


def check_weights(weights: Any, num_models: int) -> jax.Array:
    """Checks on the host that expert weights are a convex combination.

    Traced weights pass unseen: the rule that computes them has to normalise them.

    Args:
        weights: ``[model]`` or ``[model, *batch]``.
        num_models: how many experts they are for.

    Returns:
        The weights as a float array.

    Raises:
        ValueError: if their number is wrong, or one is negative or not finite, or they
            do not sum to one within 1e-4.

    Example:
        >>> check_weights([0.5, 0.5], 2).tolist()
        [0.5, 0.5]
    """
    if np.ndim(weights) < 1 or np.shape(weights)[0] != num_models:
        raise ValueError(
            f"weights have shape {np.shape(weights)}, expected one for each of the "
            f"{num_models} experts along the first axis"
        )
    if isinstance(weights, Tracer):
        return weights
    values = np.asarray(weights, np.float64)
    shown = np.array2string(values, threshold=16, separator=", ")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(
            f"weights {shown} hold a negative or non-finite value; expected "
            "non-negative weights that sum to one (0 leaves an expert out)"
        )
    total = values.sum(axis=0)
    if np.abs(total - 1.0).max(initial=0.0) > 1e-4:
        fix = "; divide each by their sum"
        if values.ndim == 1 and total > 0:
            fix += f": {(values / total).round(6).tolist()}"
        worst = total.flat[np.abs(total - 1.0).argmax()]
        raise ValueError(f"weights {shown} sum to {worst:.6g}, expected 1{fix}")
    floating = isinstance(weights, jax.Array) and jnp.issubdtype(
        weights.dtype, jnp.floating
    )
    return jnp.asarray(weights, weights.dtype if floating else jnp.result_type(float))


def align_weights(
    weights: Float[Array, "model *#weighted"], shape: tuple[int, ...]
) -> Float[Array, "model *#aligned"]:
    """Reshapes ``[model]`` or ``[model, *batch]`` weights to the rank of ``shape``.

    Args:
        weights: one per expert, or one per expert and row.
        shape: ``[model, *batch]``, what the weights are to be multiplied with.

    Raises:
        ValueError: if the weights fit neither shape.

    Example:
        >>> align_weights(jnp.ones(2), (2, 5)).shape
        (2, 1)
    """
    if weights.ndim == 1:
        weights = weights.reshape(weights.shape + (1,) * (len(shape) - 1))
    fits = len(weights.shape) == len(shape) and all(
        size in (1, wanted) for size, wanted in zip(weights.shape, shape, strict=True)
    )
    if not fits or weights.shape[0] != shape[0]:
        raise ValueError(
            f"weights of shape {weights.shape} fit neither [model] nor [model, *batch] "
            f"= {shape}"
        )
    return weights
