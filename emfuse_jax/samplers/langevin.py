"""Langevin samplers: ``y ← y - h ∇E(y) + s ε`` with ``ε ~ N(0, I)``.

With ``s = √(2hT)`` this is the unadjusted Langevin algorithm: it samples ``exp(-E/T)``
up to a bias of order ``h`` (no accept step; for an exact one see `from_blackjax`). With
a falling ``h`` and a smaller ``s`` it is the annealed, clipped chain that energy models
are trained and sampled with: no sampler of ``exp(-E)``, but a noisy descent of it.

A step evaluates one gradient, at the position where it starts. There is no accept step
that would need it again, so the state does not carry one.

References:
    Roberts, Tweedie, "Exponential Convergence of Langevin Distributions and Their
    Discrete Approximations", Bernoulli 2(4), 1996. https://doi.org/10.2307/3318418
    Du, Mordatch, "Implicit Generation and Modeling with Energy-Based Models", NeurIPS
    2019. https://arxiv.org/abs/1903.08689
    Florence et al., "Implicit Behavioral Cloning", CoRL 2021, appendix B.3.
    https://arxiv.org/abs/2109.00137
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from emfuse_jax.base import EnergyFn, Key, Sampler
from emfuse_jax.samplers._common import (
    Bounds,
    Schedule,
    check_bounds,
    check_positive,
    clip_to_box,
    energy_and_gradient,
)

__all__ = [
    "LangevinInfo",
    "LangevinState",
    "annealed_langevin",
    "etm_langevin",
    "etm_schedule",
    "ula",
]


class LangevinState(NamedTuple):
    """Where the chains are."""

    position: Float[Array, "*batch dim"]
    step: Int[Array, ""]


class LangevinInfo(NamedTuple):
    """What a step saw where it started, and the share of coordinates that it clipped.

    What is not kept is not computed: under jit, unused fields cost nothing.
    """

    energy: Float[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]
    drift_clip_rate: Float[Array, "*batch"]
    step_clip_rate: Float[Array, "*batch"]
    bounds_rate: Float[Array, "*batch"]


def ula(
    energy_fn: EnergyFn,
    step_size: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    drift_clip: ArrayLike | None = None,
    bounds: Bounds | None = None,
) -> Sampler:
    """The unadjusted Langevin algorithm: ``y ← y - h ∇E(y) + √(2hT) ε``.

    On ``N(0, s²)`` its stationary variance is ``s² / (1 - h / (2s²))``, not ``s²``.

    Args:
        energy_fn: ``[*batch, dim] -> [*batch]``, each row for itself.
        step_size: ``h``, positive.
        temperature: ``T``; 0 is gradient descent.
        drift_clip: largest magnitude of each coordinate of the gradient.
        bounds: the box that positions are clipped to.

    Returns:
        A `Sampler` of `LangevinState` and `LangevinInfo`. Its noise is
        ``jax.random.normal(key, position.shape)``.

    Raises:
        ValueError: if ``step_size`` is not positive or the bounds are out of order.

    Example:
        >>> from emfuse_jax.loops import run_sampler
        >>> sampler = ula(lambda y: 0.5 * jnp.sum(y**2, axis=-1), 0.1)
        >>> state, _ = run_sampler(jax.random.key(0), sampler, jnp.zeros((8, 2)), 20)
        >>> state.position.shape
        (8, 2)
    """
    check_positive("step_size", step_size)
    return annealed_langevin(
        energy_fn,
        lambda step: step_size,
        lambda step: jnp.sqrt(2.0 * jnp.asarray(step_size) * temperature),
        drift_clip=drift_clip,
        bounds=bounds,
    )


def annealed_langevin(
    energy_fn: EnergyFn,
    step_size_schedule: Schedule,
    noise_schedule: Schedule | None,
    *,
    drift_clip: ArrayLike | None = None,
    step_clip: ArrayLike | None = None,
    bounds: Bounds | None = None,
) -> Sampler:
    """Langevin with schedules and clips: ``y ← clip(y + clip(-h_i clip(∇E) + s_i ε))``.

    Mind the reach: from where it starts a noiseless chain moves each coordinate by at
    most ``drift_clip · Σ h_i``. `LangevinInfo` tells how often each clip was active.

    Args:
        energy_fn: ``[*batch, dim] -> [*batch]``, each row for itself.
        step_size_schedule: ``h_i``.
        noise_schedule: ``s_i``, the standard deviation of the added noise; with
            ``√(2h_i)`` this is `ula`. None draws no noise: a deterministic descent.
        drift_clip: largest magnitude of each coordinate of the gradient.
        step_clip: largest magnitude of each coordinate of the step, noise included.
        bounds: the box that positions are clipped to.

    Returns:
        A `Sampler` of `LangevinState` and `LangevinInfo`.

    Raises:
        ValueError: if a clip is not positive or the bounds are out of order; while
            tracing, if ``energy_fn`` does not return one energy per row.

    Example:
        >>> from emfuse_jax.loops import run_sampler
        >>> sampler = annealed_langevin(
        ...     lambda y: 0.5 * jnp.sum(y**2, axis=-1), optax.constant_schedule(0.5), None
        ... )
        >>> state, _ = run_sampler(jax.random.key(0), sampler, jnp.ones(1), 3)
        >>> state.position.tolist()  # no noise: halved three times
        [0.125]
    """
    check_positive("drift_clip", drift_clip)
    check_positive("step_clip", step_clip)
    check_bounds(bounds)

    def init(position: Float[Array, "*batch dim"]) -> LangevinState:
        return LangevinState(position, jnp.zeros((), jnp.int32))

    def step(key: Key, state: LangevinState) -> tuple[LangevinState, LangevinInfo]:
        position, dtype = state.position, state.position.dtype
        energy, gradient = energy_and_gradient(energy_fn, position)
        drift, drift_clip_rate = _clip(gradient, drift_clip)
        move = -jnp.asarray(step_size_schedule(state.step), dtype) * drift
        if noise_schedule is not None:
            noise = jax.random.normal(key, position.shape, dtype)
            move += jnp.asarray(noise_schedule(state.step), dtype) * noise
        move, step_clip_rate = _clip(move, step_clip)
        free = position + move
        moved = clip_to_box(free, bounds)
        info = LangevinInfo(
            energy=energy,
            gradient_norm=jnp.sqrt(jnp.sum(jnp.square(gradient), axis=-1)),
            drift_clip_rate=drift_clip_rate,
            step_clip_rate=step_clip_rate,
            bounds_rate=_clip_rate(free, moved),
        )
        return LangevinState(moved, state.step + 1), info

    return Sampler(init, step)


def etm_schedule(
    num_steps: int, first: float = 0.1, last: float = 1e-3, power: int | float = 2
) -> Schedule:
    """``η_i = (first - last) (1 - i / (num_steps - 1))^power + last``.

    Example:
        >>> schedule = etm_schedule(50)
        >>> print(f"{sum(schedule(i) for i in range(50)):.4f}")
        1.7168
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}; expected at least 1")
    return optax.polynomial_schedule(first, last, power, max(num_steps - 1, 1))


def etm_langevin(
    energy_fn: EnergyFn,
    num_steps: int,
    *,
    first: float = 0.1,
    last: float = 1e-3,
    noise: ArrayLike = 0.5,
    drift_clip: ArrayLike | None = 10.0,
    step_clip: ArrayLike | None = 0.5,
    bounds: Bounds | None = (-1.1, 1.1),
) -> Sampler:
    """The chain of energy transition models: steps of ``η_i (½ clip(∇E) + noise · ε)``.

    The noise is multiplied by ``η_i`` and not by its root, so this does not sample
    ``exp(-E)``. The defaults are those of training, in targets scaled to ``[-1, 1]``;
    for a mode take ``last=1e-5, noise=0.0``. A ``drift_clip`` below the margin of the
    gradient penalty cuts the reach: 30 steps with a clip of 0.5 move a coordinate by at
    most 0.254.

    Args:
        energy_fn: ``[*batch, dim] -> [*batch]``, each row for itself.
        num_steps: how many steps the schedule lasts; later ones use ``last``.
        first: ``η`` of the first step.
        last: ``η`` of the last step.
        noise: factor of the noise; the number 0 draws none.
        drift_clip: largest magnitude of each coordinate of the gradient.
        step_clip: largest magnitude of each coordinate of a step.
        bounds: the box that positions are clipped to.

    References:
        Chen et al., "Offline Transition Modeling via Contrastive Energy Learning", ICML
        2024, and its public code.

    Example:
        >>> from emfuse_jax.loops import run_sampler
        >>> def bowl(y):
        ...     return 10 * jnp.sum((y - 0.9) ** 2, axis=-1)
        >>> sampler = etm_langevin(bowl, 50, last=1e-5, noise=0.0)
        >>> state, _ = run_sampler(jax.random.key(0), sampler, jnp.zeros(1), 50)
        >>> print(f"{state.position[0]:.4f}")
        0.9000
    """
    schedule = etm_schedule(num_steps, first, last)
    silent = isinstance(noise, int | float) and noise == 0
    return annealed_langevin(
        energy_fn,
        lambda step: 0.5 * schedule(step),
        None if silent else lambda step: noise * schedule(step),
        drift_clip=drift_clip,
        step_clip=step_clip,
        bounds=bounds,
    )


def _clip(x: jax.Array, limit: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    if limit is None:
        return x, _clip_rate(x, x)
    limit = jnp.asarray(limit, x.dtype)
    clipped = jnp.clip(x, -limit, limit)
    return clipped, _clip_rate(x, clipped)


def _clip_rate(free: jax.Array, clipped: jax.Array) -> jax.Array:
    if clipped is free:
        return jnp.zeros(free.shape[:-1], free.dtype)
    return jnp.mean(clipped != free, axis=-1, dtype=free.dtype)
