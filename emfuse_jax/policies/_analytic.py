"""The intermediate energy of a value in closed form, from a Gaussian posterior.

A noisy action ``a_t`` leaves a posterior of the action, ``μ(a_0|a_t) ≈ N(m, v I)``. With a
value ``Q`` expanded around ``ā`` the energy ``E_t = -log E[exp(β Q(a_0)) | a_t]`` is a
Gaussian integral. The sign is this library's: low is good, the negative of the published one.

``m`` is Tweedie's mean. ``v`` is the posterior variance averaged over noisy actions, from
one of two identities that are exact for the exact noise and fail where the other is good:

* from the noise: ``v = σ²/α² (1 - E|ε|²/d)``. At high noise a relative error of 10⁻³ in ``ε``
  is multiplied by ``σ²/α²``, which is 3.5 · 10³ at ``t = 0.9``;
* from the action: ``v = Var(a_0) - E|m - E a_0|²/d``, a small difference at low noise.

References:
    "Analytic Energy-Guided Policy Optimization for Offline Reinforcement Learning", 2025,
    equations 5 to 11. https://arxiv.org/abs/2505.01822
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from emfuse_jax.policies import _vp
from emfuse_jax.policies._learning import running_mean


class PosteriorMoments(NamedTuple):
    """Running means over a training run, those of ``a_t`` in bins of equal width in ``t``."""

    action_mean: Float[Array, "act"]
    action_square: Float[Array, ""]
    noise_square: Float[Array, "bin"]
    deviation: Float[Array, "bin"]
    num_batches: Int[Array, ""]
    bin_batches: Int[Array, "bin"]


def first_order_energy(
    value: Float[Array, "*batch"],
    gradient: Float[Array, "*batch act"],
    offset: Float[Array, "*batch act"],
    variance: Float[Array, "*batch"],
    *,
    inverse_temperature: ArrayLike,
) -> Float[Array, "*batch"]:
    """``-[β Q(ā) + β ∇Q(ā)·(m - ā) + ½ β² v |∇Q(ā)|²]`` (equation 11).

    Exact where ``Q`` is linear. Where it is quadratic with curvature ``-h``, the gradient in
    ``a_t`` is the exact one times ``1 - (β h v)²``: beyond ``β h v = 1`` it points away from
    the optimum, see `second_order_energy`.

    Args:
        value: ``Q(ā)``.
        gradient: ``∇Q(ā)``.
        offset: ``m - ā``.
        variance: ``v`` of each row.
        inverse_temperature: ``β``.

    Example:
        >>> slope = jnp.array([2.0, 0.0])
        >>> energy = first_order_energy(jnp.array(1.0), slope, jnp.array([0.5, 3.0]),
        ...                             jnp.array(0.25), inverse_temperature=1.0)
        >>> float(energy)
        -2.5
    """
    linear = value + jnp.sum(gradient * offset, axis=-1)
    spread = variance * jnp.sum(jnp.square(gradient), axis=-1)
    beta = jnp.asarray(inverse_temperature)
    return -beta * (linear + 0.5 * beta * spread)


def second_order_energy(
    value: Float[Array, "*batch"],
    gradient: Float[Array, "*batch act"],
    hessian: Float[Array, "*batch act act"],
    offset: Float[Array, "*batch act"],
    variance: Float[Array, "*batch"],
    *,
    inverse_temperature: ArrayLike,
) -> Float[Array, "*batch"]:
    """The Gaussian integral of the second-order expansion, exact for concave quadratics.

    With ``H = -∇²Q(ā)``, ``δ = m - ā`` and ``P = I + β v H`` it is

        ``-[β (Q + ∇Q·δ - ½ δᵀHδ) - ½ log det P + ½ β² v (∇Q - Hδ)ᵀ P⁻¹ (∇Q - Hδ)]``

    Directions in which ``Q`` is convex count as linear: there the integral may not exist.

    Args:
        value: ``Q(ā)``.
        gradient: ``∇Q(ā)``.
        hessian: ``∇²Q(ā)``, symmetric.
        offset: ``m - ā``.
        variance: ``v`` of each row.
        inverse_temperature: ``β``.
    """
    beta = jnp.asarray(inverse_temperature)
    eigenvalue, basis = jnp.linalg.eigh(-hessian)
    eigenvalue = jnp.maximum(eigenvalue, 0.0)

    def rotate(vector: jax.Array) -> jax.Array:
        return jnp.sum(basis * vector[..., None], axis=-2)

    slope, shift = rotate(gradient), rotate(offset)
    mean_value = value + jnp.sum(slope * shift - 0.5 * eigenvalue * shift**2, axis=-1)
    precision = 1.0 + beta * variance[..., None] * eigenvalue
    at_mean = slope - eigenvalue * shift
    spread = beta * variance * jnp.sum(jnp.square(at_mean) / precision, axis=-1)
    log_det = jnp.sum(jnp.log(precision), axis=-1)
    return -(beta * (mean_value + 0.5 * spread) - 0.5 * log_det)


def variance_from_noise(
    time: Float[ArrayLike, "*batch"], noise_square: Float[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """``σ²/α² (1 - E|ε|²/d)``: the posterior variance at low noise (option 1)."""
    alpha, sigma = _vp.alpha_sigma(time)
    return jnp.square(sigma / alpha) * (1.0 - noise_square)


def variance_from_action(
    action_variance: ArrayLike, deviation: Float[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """``Var(a_0) - E|m - E a_0|²/d``: the posterior variance at high noise (option 2)."""
    return jnp.asarray(action_variance - jnp.asarray(deviation))


def posterior_variance(
    time: Float[ArrayLike, "*batch"],
    noise_square: Float[ArrayLike, "*batch"],
    action_variance: ArrayLike,
    deviation: Float[ArrayLike, "*batch"],
) -> Float[Array, "*batch"]:
    """The better of both identities at each time, inside the bounds that hold for any law.

    From the noise where ``σ²/α² < Var(a_0)``, else from the action; then clipped to
    ``[0, Var(a_0) σ² / (α² Var(a_0) + σ²)]``, the error of the best linear estimate.

    Args:
        time: ``t``.
        noise_square: ``E|ε(a_t, t)|²/d`` at these times.
        action_variance: ``Var(a_0)``, averaged over dimensions.
        deviation: ``E|m - E a_0|²/d`` at these times.
    """
    alpha, sigma = _vp.alpha_sigma(time)
    low_noise = jnp.square(sigma / alpha) < action_variance
    variance = jnp.where(
        low_noise,
        variance_from_noise(time, noise_square),
        variance_from_action(action_variance, deviation),
    )
    return jnp.clip(variance, 0.0, linear_variance(time, action_variance))


def linear_variance(
    time: Float[ArrayLike, "*batch"], action_variance: ArrayLike
) -> Float[Array, "*batch"]:
    """``V σ² / (α² V + σ²)``: of Gaussian actions with variance ``V``; others have less."""
    alpha, sigma = _vp.alpha_sigma(time)
    variance = jnp.asarray(action_variance)
    total = jnp.square(alpha) * variance + jnp.square(sigma)
    return variance * jnp.square(sigma) / total


def init_moments(num_bins: int, action_size: int) -> PosteriorMoments:
    """No rows seen yet.

    Raises:
        ValueError: if there are no bins.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}; expected at least 1 (64 is plenty)")
    bins = jnp.zeros(num_bins)
    none = jnp.zeros((), jnp.int32)
    return PosteriorMoments(
        action_mean=jnp.zeros(action_size),
        action_square=jnp.zeros(()),
        noise_square=bins,
        deviation=jnp.zeros(num_bins),
        num_batches=none,
        bin_batches=jnp.zeros(num_bins, jnp.int32),
    )


def update_moments(
    moments: PosteriorMoments,
    action: Float[Array, "row act"],
    noise: Float[Array, "row act"],
    posterior_mean: Float[Array, "row act"],
    time: Float[Array, "row"],
    *,
    rate: float,
) -> PosteriorMoments:
    """Folds one batch in: plain means at first, then moving averages with this rate.

    Args:
        moments: so far.
        action: ``a_0`` of the rows.
        noise: ``ε(a_t, t)``, as predicted.
        posterior_mean: ``m``, as predicted.
        time: ``t``; bins without a row keep what they have.
        rate: of the moving averages.
    """
    batches = moments.num_batches
    mean = running_mean(moments.action_mean, jnp.mean(action, axis=0), batches, rate)
    square = jnp.mean(jnp.square(action - mean[None]))
    square = running_mean(moments.action_square, square, batches, rate)
    num_bins = moments.noise_square.size
    index = jnp.clip((time * num_bins).astype(jnp.int32), 0, num_bins - 1)
    rows = jnp.zeros(num_bins).at[index].add(1.0)

    def fold(average: jax.Array, value: jax.Array) -> jax.Array:
        batch = jnp.zeros(num_bins).at[index].add(value) / jnp.maximum(rows, 1.0)
        moved = running_mean(average, batch, moments.bin_batches, rate)
        return jnp.where(rows > 0, moved, average)

    far = jnp.mean(jnp.square(posterior_mean - mean[None]), axis=-1)
    return PosteriorMoments(
        action_mean=mean,
        action_square=square,
        noise_square=fold(moments.noise_square, jnp.mean(jnp.square(noise), axis=-1)),
        deviation=fold(moments.deviation, far),
        num_batches=moments.num_batches + 1,
        bin_batches=moments.bin_batches + (rows > 0),
    )


def variance_at(
    moments: PosteriorMoments, time: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """``v`` at any times, from the table.

    What is interpolated is the ratio to `linear_variance`, which is 1 for Gaussian actions
    at every time and smooth where the variance itself spans decades.
    """
    num_bins = moments.noise_square.size
    centers = (jnp.arange(num_bins) + 0.5) / num_bins
    total = moments.action_square
    table = posterior_variance(
        centers, moments.noise_square, total, moments.deviation
    ) / jnp.maximum(linear_variance(centers, total), 1e-12)
    ratio = jnp.interp(time, centers, table)
    return ratio * linear_variance(time, total)
