"""Arithmetic over pytrees that jax and optax do not have under one name."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def stack(trees: Sequence[Any]) -> Any:
    """Stacks pytrees of one structure along a new leading axis.

    Raises:
        ValueError: if ``trees`` is empty or the structures or shapes differ.

    Example:
        >>> stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])["w"].shape
        (2, 2)
    """
    if not trees:
        raise ValueError("stack got no trees; expected at least one")
    shapes = [jax.tree.map(jnp.shape, tree) for tree in trees]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"tree {index} has shapes {shape}, tree 0 has {shapes[0]}; only trees of one "
                "architecture can be stacked: pass them as a tuple instead"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list[Any]:
    """The inverse of `stack`.

    Example:
        >>> [float(tree["w"]) for tree in unstack({"w": jnp.array([1.0, 2.0])})]
        [1.0, 2.0]
    """
    size = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(size)]


def weighted_mean(tree: Any, weights: jax.Array) -> Any:
    """``Σ_i w_i leaf_i`` over the leading axis of every leaf; ``weights`` is ``[model]``.

    Example:
        >>> weighted_mean({"w": jnp.array([[1.0], [3.0]])}, jnp.array([0.5, 0.5]))["w"].tolist()
        [2.0]
    """
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, axes=1), tree)


def select(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """``where`` over pytrees; ``condition [*batch]`` is broadcast over trailing axes.

    Example:
        >>> rows = select(jnp.array([True, False]), jnp.ones((2, 2)), jnp.zeros((2, 2)))
        >>> rows.tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(choose, on_true, on_false)


def same_structure(first: Any, second: Any) -> bool:
    """Whether two trees agree in structure, shapes and dtypes.

    Example:
        >>> same_structure({"w": jnp.zeros(2)}, {"w": jnp.ones(2)})
        True
        >>> same_structure({"w": jnp.zeros(2)}, {"w": jnp.ones(3)})
        False
    """

    def describe(tree: Any) -> Any:
        return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)

    return jax.tree.structure(first) == jax.tree.structure(second) and describe(
        first
    ) == describe(second)
