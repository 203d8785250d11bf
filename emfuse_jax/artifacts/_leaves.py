"""Leaves of a checkpoint: their names, shapes, bits and places."""

import functools
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def tree_digest(tree: Any) -> str:
    """A digest of every leaf's name, shape, dtype and bits.

    Example:
        >>> tree_digest({"w": jnp.zeros(2)}) == tree_digest({"w": jnp.zeros(2)})
        True
        >>> tree_digest({"w": jnp.zeros(2)}) == tree_digest({"w": -jnp.zeros(2)})
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in named_leaves(jax.tree.map(canonical, tree)):
        array = whole(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def whole(leaf: Any) -> np.ndarray:
    """All of an array, also where other processes hold parts of it."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def check_architecture(saved: Any, expected: Any, where: pathlib.Path) -> None:
    for name in dict.fromkeys([*saved, *expected]):
        here, there = expected.get(name), saved.get(name)
        if here != there:
            raise ValueError(
                f"{where} is of another architecture: leaf {name} is "
                f"{there or 'absent'} in the checkpoint, {here or 'absent'} in the "
                "model; build the model with the config that it was trained with"
            )


def describe_leaves(tree: Any) -> dict[str, str]:
    return {
        name: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
        for name, leaf in named_leaves(tree)
    }


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return [(name(path), leaf) for path, leaf in leaves]


def canonical(leaf: Any) -> Any:
    """Python numbers as the arrays that jax would make of them."""
    if isinstance(leaf, bool | int | float):
        return np.asarray(leaf, jnp.result_type(leaf))
    if jax.process_count() > 1 and isinstance(leaf, jax.Array) and not is_key(leaf):
        # Orbax takes the arrays of one process from nobody but numpy.
        return np.asarray(leaf) if leaf.is_fully_addressable else leaf
    return leaf


def placed(leaf: Any) -> Any:
    """The leaf as a template: shape, dtype and where to put it."""
    if isinstance(leaf, bool | int | float | np.ndarray | np.generic):
        return leaf
    sharding = leaf.sharding
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )
