"""Descent of an energy: gradient steps with Nesterov's momentum, as far as each row needs.

``â = a + μ v``, ``v ← μ v - η ∇E(â)``, ``a ← a + v``. The same step serves a model that is
trained through its descent (`run_sampler` over it is differentiable, twice over the
energy) and one that acts (`minimize` stops each row by itself).

References:
    Nesterov, "A method for solving the convex programming problem with convergence rate
    O(1/k²)", 1983.
    Davies et al., "EBT-Policy: Energy Unlocks Emergent Physical Reasoning Capabilities",
    2025, and its public code. https://arxiv.org/abs/2510.27545
    Gladstone et al., "Energy-Based Transformers are Scalable Learners and Thinkers",
    2025. https://arxiv.org/abs/2507.02092
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from emfuse_jax.base import EnergyFn, Key, Sampler
from emfuse_jax.samplers._common import Schedule, check_positive, energy_and_gradient
from emfuse_jax.tree import select

__all__ = [
    "Descended",
    "DescentInfo",
    "DescentState",
    "descent",
    "max_step_size",
    "minimize",
]

Normalize = Literal["none", "sample", "batch"]


class DescentState(NamedTuple):
    """Where the rows are, and how fast they move."""

    position: Float[Array, "*batch dim"]
    velocity: Float[Array, "*batch dim"]
    step: Int[Array, ""]


class DescentInfo(NamedTuple):
    """What a step saw, and where it took the gradient: ``a + μ v`` of the normalised, noisy
    ``a``."""

    position: Float[Array, "*batch dim"]
    energy: Float[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]


class Descended(NamedTuple):
    """The end of a descent, row by row.

    ``num_steps`` counts the steps that moved the row. ``gradient_norm`` is the last one
    seen: at ``position`` for rows that stopped, for the others at the point from which the
    last step led there. ``start_energy`` is that of the start as it was given. A row whose
    ``energy`` is above it was taken too far: the step size does not suit the energy's
    curvature (see `max_step_size`).
    """

    position: Float[Array, "*batch dim"]
    energy: Float[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    gradient_norm: Float[Array, "*batch"]
    start_energy: Float[Array, "*batch"]


def max_step_size(curvature: ArrayLike, momentum: ArrayLike = 0.0) -> jax.Array:
    """The step size above which the descent of a quadratic energy diverges.

    ``(2 + 2μ) / (1 + 2μ) / λ`` for the largest eigenvalue ``λ`` of the Hessian; ``2 / λ``
    without momentum.

    Example:
        >>> print(f"{max_step_size(1.0):.3f} {max_step_size(1.0, 0.9):.3f}")
        2.000 1.357
    """
    _check_momentum(momentum)
    mu = jnp.asarray(momentum)
    return (2.0 + 2.0 * mu) / (1.0 + 2.0 * mu) / jnp.asarray(curvature)


def descent(
    energy_fn: EnergyFn,
    step_size: ArrayLike,
    *,
    momentum: ArrayLike = 0.0,
    noise_schedule: Schedule | None = None,
    normalize: Normalize = "none",
    energy_scaled: bool = False,
    detach: bool = False,
) -> Sampler:
    """Gradient descent with Nesterov's momentum, and EBT-Policy's options.

    Before the gradient is taken, the position is normalised and moved by noise. (Noise
    before a step and noise after it, as in `annealed_langevin`, have stationary variances
    that differ by the factor ``(1 - η λ)²``.)

    Args:
        energy_fn: ``[*batch, dim] -> [*batch]``, each row for itself.
        step_size: ``η``, one number or one per row ``[*batch]``.
        momentum: ``μ`` in [0, 1).
        noise_schedule: standard deviation of the noise by step; None draws none.
        normalize: divide each position by its root mean square (``"sample"``), or all by
            that of the whole array (``"batch"``: the authors', which lets one row change
            another's answer), or not at all.
        energy_scaled: multiply ``η`` by ``exp(E)``, the authors' step. Where energies
            grow with the distance it diverges beyond some distance.
        detach: take position and velocity as constants of the step, so that a step's
            derivative is that step's alone.

    Returns:
        A `Sampler` of `DescentState` and `DescentInfo`; its noise is
        ``jax.random.normal(key, position.shape)``.

    Raises:
        ValueError: if ``step_size`` is not positive, ``momentum`` not in [0, 1) or
            ``normalize`` unknown.

    Example:
        >>> from emfuse_jax.loops import run_sampler
        >>> sampler = descent(lambda y: jnp.sum((y - 3.0) ** 2, axis=-1), 0.5)
        >>> state, _ = run_sampler(jax.random.key(0), sampler, jnp.zeros(2), 1)
        >>> state.position.tolist()
        [3.0, 3.0]
    """
    _check_momentum(momentum)
    check_positive("step_size", step_size)
    if normalize not in ("none", "sample", "batch"):
        raise ValueError(f"normalize={normalize!r}; expected none, sample or batch")

    def init(position: Float[Array, "*batch dim"]) -> DescentState:
        return DescentState(
            position, jnp.zeros_like(position), jnp.zeros((), jnp.int32)
        )

    def step(key: Key, state: DescentState) -> tuple[DescentState, DescentInfo]:
        position, velocity = state.position, state.velocity
        if detach:
            position, velocity = jax.lax.stop_gradient((position, velocity))
        if normalize != "none":
            axis = -1 if normalize == "sample" else None
            square = jnp.mean(jnp.square(position), axis=axis, keepdims=True)
            position = position * jax.lax.rsqrt(square + 1e-12)
        if noise_schedule is not None:
            noise = jax.random.normal(key, position.shape, position.dtype)
            position = position + noise_schedule(state.step) * noise
        ahead = position + momentum * velocity
        energy, gradient = energy_and_gradient(energy_fn, ahead)
        size = jnp.broadcast_to(jnp.asarray(step_size, energy.dtype), energy.shape)
        if energy_scaled:
            size = size * jnp.exp(energy)
        velocity = jnp.asarray(momentum) * velocity - size[..., None] * gradient
        norm = jnp.linalg.norm(jax.lax.stop_gradient(gradient), axis=-1)
        moved = DescentState(position + velocity, velocity, state.step + 1)
        return moved, DescentInfo(ahead, energy, norm)

    return Sampler(init, step)


def minimize(
    key: Key,
    energy_fn: EnergyFn,
    sampler: Sampler,
    position: Float[Array, "*batch dim"],
    max_steps: int,
    *,
    tolerance: ArrayLike = 0.0,
) -> Descended:
    """Descends until each row's own gradient is small; no row waits or works for another.

    A row stops where it first sees a gradient norm of at most ``tolerance``, and stays
    there while others go on: with momentum that is the point ahead, ``a + μ v``. It also
    stops before a step that would leave the finite numbers. The loop ends with the last
    row. Reverse-mode derivatives need a fixed number of steps: take `run_sampler` for
    those.

    Args:
        key: step ``i`` uses ``fold_in(key, i)``.
        energy_fn: what ``sampler`` descends.
        sampler: a `descent`.
        position: where the rows start.
        max_steps: a static bound, at least 1.
        tolerance: of the gradient norm; 0 takes all steps.

    Raises:
        ValueError: if ``max_steps`` or ``tolerance`` is out of range.

    Example:
        >>> def energy_fn(y):
        ...     return 0.5 * jnp.sum(y**2, axis=-1)
        >>> start = jnp.array([[0.01], [0.1], [1.0], [10.0]])
        >>> sampler = descent(energy_fn, 0.3)
        >>> key = jax.random.key(0)
        >>> minimize(
        ...     key, energy_fn, sampler, start, 99, tolerance=1e-3
        ... ).num_steps.tolist()
        [7, 13, 20, 26]
    """
    check_steps("max_steps", max_steps)
    if isinstance(tolerance, int | float) and not tolerance >= 0:
        raise ValueError(f"tolerance={tolerance}; expected a gradient norm, at least 0")

    def proceed(carry: Any) -> jax.Array:
        state, _, active, _ = carry
        return jnp.any(active) & (state.step < max_steps)

    def body(carry: Any) -> Any:
        state, last, active, num_steps = carry
        moved, seen = sampler.step(jax.random.fold_in(key, state.step), state)
        there = active & (seen.gradient_norm <= tolerance)
        finite = jnp.all(jnp.isfinite(moved.position), axis=-1)
        last = select(active, seen, last)
        active = active & (seen.gradient_norm > tolerance) & finite
        position, velocity = select(active, moved[:2], state[:2])
        position = select(there, seen.position, position)
        state = DescentState(position, velocity, moved.step)
        return state, last, active, num_steps + active

    batch = position.shape[:-1]
    nothing = jnp.zeros(batch, position.dtype)
    counts, active = jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool)
    seen = DescentInfo(position, nothing, nothing)
    start = (sampler.init(position), seen, active, counts)
    state, seen, _, counts = jax.lax.while_loop(proceed, body, start)
    end = state.position
    # Rows that stopped were seen where they are, the others before their last step.
    known = seen.gradient_norm <= tolerance
    energy = jax.lax.cond(
        jnp.all(known),
        lambda: seen.energy,
        lambda: jnp.where(known, seen.energy, energy_fn(end)),
    )
    return Descended(end, energy, counts, seen.gradient_norm, energy_fn(position))


def check_steps(name: str, num_steps: int) -> None:
    """Refuses a descent of no steps."""
    if num_steps < 1:
        raise ValueError(
            f"{name}={num_steps}; a descent needs at least 1 step: without one the answer "
            "is the random start"
        )


def _check_momentum(momentum: ArrayLike) -> None:
    if isinstance(momentum, int | float) and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}; expected a number in [0, 1)")
