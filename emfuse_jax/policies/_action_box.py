"""The box in which actions are searched, scaled to [-1, 1]."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float


class ActionBox(NamedTuple):
    """Where actions are searched, in raw units: ``low < high`` in every dimension."""

    low: Float[Array, "act"]
    high: Float[Array, "act"]


def action_box(
    actions: Any, *, margin: float = 0.05, limits: tuple[float, float] = (-1.0, 1.0)
) -> ActionBox:
    """The range of recorded actions, widened by ``margin`` of it, within ``limits``.

    A wrong box is the most common fault of implicit cloning: too small and the expert's
    own actions cannot be found, too large and most negatives teach nothing.

    Args:
        actions: ``[rows, act]``.
        margin: share of the range added at either end. A constant dimension gets this
            share of the limits' range.
        limits: of the actions that the environment takes.

    Raises:
        ValueError: without rows, if actions lie outside the limits, or for a negative
            margin.

    Example:
        >>> box = action_box(jnp.array([[-0.5, 0.0], [0.5, 1.0]]))
        >>> [f"{x:.2f}" for x in (*box.low, *box.high)]
        ['-0.55', '-0.05', '0.55', '1.00']
    """
    actions = np.asarray(actions, np.float32)
    if actions.ndim != 2 or len(actions) == 0:
        raise ValueError(f"actions of shape {actions.shape}; expected [rows, act]")
    if not margin >= 0:
        raise ValueError(f"margin={margin}; expected 0 or more: the box holds the data")
    least, most = actions.min(axis=0), actions.max(axis=0)
    if (least < limits[0] - 1e-6).any() or (most > limits[1] + 1e-6).any():
        raise ValueError(
            f"actions reach from {float(least.min()):.4g} to {float(most.max()):.4g}, "
            f"outside the limits {limits}; rescale them, or pass their own limits"
        )
    width = most - least
    width = np.where(width > 1e-6, width, limits[1] - limits[0])
    return ActionBox(
        jnp.asarray(np.maximum(least - margin * width, limits[0])),
        jnp.asarray(np.minimum(most + margin * width, limits[1])),
    )


def checked_box(box: ActionBox, action_size: int) -> ActionBox:
    """The box; raises unless ``low < high``, one of each per dimension."""
    shapes = box.low.shape, box.high.shape
    if shapes != ((action_size,), (action_size,)):
        raise ValueError(
            f"a box of shapes {shapes}; expected ({action_size},) twice, one bound per "
            "dimension of an action"
        )
    traced = isinstance(box.low, Tracer) or isinstance(box.high, Tracer)
    # NumPy's: jnp would trace the comparison of known bounds, too, where init is jitted.
    if not traced and not np.all(np.asarray(box.low) < np.asarray(box.high)):
        raise ValueError(
            f"the box reaches from {box.low} to {box.high}; expected low < high in every "
            "dimension, see action_box"
        )
    return box


def scale(box: ActionBox, action: jax.Array) -> jax.Array:
    low, high = _spread(box, action)
    return 2.0 * (action - low) / (high - low) - 1.0


def unscale(box: ActionBox, scaled: jax.Array) -> jax.Array:
    low, high = _spread(box, scaled)
    return jnp.clip(low + 0.5 * (scaled + 1.0) * (high - low), low, high)


def _spread(box: ActionBox, action: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (
        jnp.broadcast_to(box.low, action.shape),
        jnp.broadcast_to(box.high, action.shape),
    )
