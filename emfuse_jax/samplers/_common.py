"""What the samplers share: schedules, boxes, and the checks of what they are given."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from emfuse_jax.base import EnergyFn

__all__ = [
    "Bounds",
    "Schedule",
    "check_bounds",
    "check_energy",
    "check_positive",
    "clip_to_box",
    "energy_and_gradient",
]

Schedule: TypeAlias = Callable[[jax.Array], ArrayLike]
"""``step -> value``, counted from 0; any optax schedule."""
Bounds: TypeAlias = tuple[ArrayLike, ArrayLike]
"""``(low, high)`` of the box that positions are clipped to, broadcast to their shape;
traced arrays make a moving trust region."""


def energy_and_gradient(
    energy_fn: EnergyFn, position: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The energies ``[*batch]`` of ``[*batch, dim]``, each row's own, and their gradients."""
    energy, pullback = jax.vjp(energy_fn, position)
    check_energy(energy, position)
    (gradient,) = pullback(jnp.ones_like(energy))
    return energy, gradient


def clip_to_box(position: jax.Array, bounds: Bounds | None) -> jax.Array:
    """The position, or the nearest one in the box."""
    if bounds is None:
        return position
    low, high = (
        jnp.broadcast_to(jnp.asarray(bound, position.dtype), position.shape)
        for bound in bounds
    )
    return jnp.clip(position, low, high)


def check_energy(energy: jax.Array, position: jax.Array, *, row: str = "row") -> None:
    """Refuses energies that are not one per ``row`` of the position."""
    if energy.shape != position.shape[:-1]:
        raise ValueError(
            f"energy_fn returned shape {energy.shape} for positions of shape "
            f"{position.shape}; expected one energy per {row}, {position.shape[:-1]}"
        )


def check_positive(name: str, value: ArrayLike | None) -> None:
    """Refuses a Python number that is not positive; arrays may be traced."""
    if isinstance(value, int | float) and not value > 0:
        raise ValueError(f"{name}={value}; expected a positive number")


def check_bounds(bounds: Bounds | None) -> None:
    """Refuses a box of Python numbers whose ends are out of order."""
    if bounds is None:
        return
    low, high = bounds
    if not (isinstance(low, int | float) and isinstance(high, int | float)):
        return
    if not low <= high:
        raise ValueError(f"bounds={bounds}; expected (low, high) with low <= high")
