"""The only normalisation in the library: an affine map per column, fitted once.

``"standard"`` is the z-score. ``"box"`` divides by the largest magnitude without
centring, so that zero stays zero ("no change") and the fitted rows lie in [-1, 1]; a
quantile below 1 in place of the largest keeps a few extreme rows from setting the
scale.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class Normalizer(NamedTuple):
    """``(x - mean) / scale``; the leaves have the shape of a row."""

    mean: Float[Array, "*row"]
    scale: Float[Array, "*row"]


def identity_normalizer(size: int) -> Normalizer:
    """The normaliser that changes nothing, for rows of ``size`` columns.

    Example:
        >>> apply(identity_normalizer(2), jnp.array([3.0, 4.0])).tolist()
        [3.0, 4.0]
    """
    return Normalizer(jnp.zeros(size), jnp.ones(size))


def fit_normalizer(
    x: Any, *, kind: str = "standard", quantile: float | None = None, axis: int = 0
) -> Normalizer:
    """Fits a normaliser to the rows of ``x``, on training rows only.

    Columns that are constant (to float32 rounding) get scale 1, so that they neither
    divide by zero nor blow up rounding noise.

    Args:
        x: rows along ``axis``.
        kind: ``"standard"`` (mean and standard deviation) or ``"box"`` (mean 0, largest
            magnitude).
        quantile: box only: this quantile of the magnitudes instead of the largest.
        axis: the rows' axis.

    Raises:
        ValueError: for an unknown kind, a quantile outside (0, 1] or without a box, or
            no rows.

    Example:
        >>> normalizer = fit_normalizer(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
        >>> apply(normalizer, jnp.array([3.0, 6.0])).tolist()
        [1.0, 1.0]
    """
    x = jnp.asarray(x)
    if kind not in ("standard", "box"):
        raise ValueError(f"kind={kind!r}; expected 'standard' or 'box'")
    if quantile is not None and not (kind == "box" and 0 < quantile <= 1):
        raise ValueError(
            f"quantile={quantile} with kind={kind!r}; a quantile in (0, 1] goes with "
            "'box'"
        )
    if x.shape[axis] == 0:
        raise ValueError(f"no rows to fit to: shape {x.shape}, axis {axis}")
    magnitude = jnp.max(jnp.abs(x), axis=axis)
    if kind == "standard":
        mean, scale = jnp.mean(x, axis=axis), jnp.std(x, axis=axis)
        spread = jnp.max(x, axis=axis) - jnp.min(x, axis=axis)
        constant = spread <= 1e-6 * magnitude
    else:
        mean, scale = jnp.zeros_like(magnitude), magnitude
        if quantile is not None:
            scale = jnp.quantile(jnp.abs(x), quantile, axis=axis)
            # A column that is mostly zero has a zero quantile but is not constant.
            scale = jnp.where(scale > 0, scale, magnitude)
        constant = magnitude < 1e-12
    return Normalizer(mean, jnp.where(constant, 1.0, scale))


def apply(
    normalizer: Normalizer, x: Float[ArrayLike, "*batch dim"]
) -> Float[Array, "*batch dim"]:
    """Raw units to normalised ones.

    Example:
        >>> normalizer = fit_normalizer(jnp.array([[1.0], [3.0]]), kind="standard")
        >>> apply(normalizer, jnp.array([[3.0]])).tolist()
        [[1.0]]
    """
    x = jnp.asarray(x)
    mean, scale = _broadcast(normalizer, x)
    return (x - mean) / scale


def invert(
    normalizer: Normalizer, x: Float[ArrayLike, "*batch dim"]
) -> Float[Array, "*batch dim"]:
    """Normalised units to raw ones.

    Example:
        >>> normalizer = fit_normalizer(jnp.array([[1.0], [3.0]]), kind="standard")
        >>> invert(normalizer, jnp.array([[1.0]])).tolist()
        [[3.0]]
    """
    x = jnp.asarray(x)
    mean, scale = _broadcast(normalizer, x)
    return x * scale + mean


def _broadcast(normalizer: Normalizer, x: jax.Array) -> Normalizer:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, x.shape), normalizer)
