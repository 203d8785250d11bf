"""Numerics that stay finite, in value and in gradient, where the plain formula does not."""

import jax
import jax.numpy as jnp


def multiply_no_nan(
    weight: jax.typing.ArrayLike, value: jax.typing.ArrayLike
) -> jax.Array:
    """``weight * value`` with ``0 · (±inf) = 0``, in value and in gradient.

    A bare ``where`` on the product would leave ``0 · inf = NaN`` in the backward pass, so
    the value is replaced before it is multiplied.

    Example:
        >>> float(multiply_no_nan(jnp.float32(0.0), -jnp.inf))
        0.0
    """
    absent = jnp.asarray(weight) == 0
    return jnp.where(absent, 0.0, weight * jnp.where(absent, 0.0, value))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """``sqrt(max(x, 0))`` whose gradient at 0 is 0 instead of infinity.

    Example:
        >>> float(jax.grad(safe_sqrt)(0.0))
        0.0
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def masked_mean(
    x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Mean of ``x`` where ``mask`` is true; 0 where nothing is.

    Example:
        >>> float(masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])))
        2.0
    """
    mask = jnp.broadcast_to(mask, x.shape).astype(x.dtype)
    total = jnp.sum(multiply_no_nan(mask, x), axis=axis)
    return total / jnp.maximum(jnp.sum(mask, axis=axis), 1.0)


def masked_variance(x: jax.Array, mask: jax.Array, axis: int) -> jax.Array:
    """Population variance of ``x`` along ``axis`` where ``mask`` is true; 0 where nothing is.

    Example:
        >>> mask = jnp.array([True, True, False])
        >>> float(masked_variance(jnp.array([1.0, 3.0, 9.0]), mask, 0))
        1.0
    """
    mean = jnp.expand_dims(masked_mean(x, mask, axis), axis)
    return masked_mean(jnp.square(x - mean), mask, axis)
