"""The mechanism of `rows` and `seeds`: which leaves have rows, and one device's share.

Nothing here knows of a mesh.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from emfuse_jax.parallel.mesh import broadcast_axes

ROW_KEY: Final = "key"
"""Marks the argument that is one key for all rows; each row gets its own from it."""


class RowPlan(NamedTuple):
    """How the arguments of one call divide into rows."""

    leaves: list[Any]
    structure: Any
    row_axes: list[int | None]
    """Per leaf; None for what all rows share, and for the key."""
    key_position: int | None
    """Which argument is the key."""
    num_rows: int
    num_devices: int
    """The leading axis of the row leaves, where they have one (pmap); 1 otherwise."""


def plan_rows(args: tuple[Any, ...], in_axes: Any, *, lead: int = 0) -> RowPlan:
    """Finds the rows of a call's arguments, or says what does not fit.

    Args:
        args: of the function that is mapped.
        in_axes: as in `rows.shard_rows`.
        lead: device axes in front of the row leaves' own axes, 1 for pmap.

    Raises:
        ValueError: if the arguments and ``in_axes`` do not fit each other.
    """
    axes = _argument_axes(args, in_axes)
    row_axes: list[int | None] = []
    for arg, argument_axes in zip(args, axes, strict=True):
        shared = argument_axes is None or argument_axes == ROW_KEY
        row_axes += broadcast_axes(None if shared else argument_axes, arg)
    leaves, structure = jax.tree.flatten(args)
    # Arrays from here on; typed keys already are.
    leaves = [x if hasattr(x, "ndim") else jnp.asarray(x) for x in leaves]
    rows = [
        (x, a + lead) for x, a in zip(leaves, row_axes, strict=True) if a is not None
    ]
    for leaf, axis in rows:
        if leaf.ndim <= axis:
            raise ValueError(
                f"an argument of shape {leaf.shape} has no row axis {axis}; set "
                "in_axes (None for what all rows share)"
            )
    return RowPlan(
        leaves,
        structure,
        row_axes,
        axes.index(ROW_KEY) if ROW_KEY in axes else None,
        _agreed("rows", {leaf.shape[axis] for leaf, axis in rows}),
        _agreed("devices", {leaf.shape[0] for leaf, _ in rows}) if lead else 1,
    )


def _argument_axes(args: tuple[Any, ...], in_axes: Any) -> tuple[Any, ...]:
    axes = (
        (None, ROW_KEY, *[0] * (len(args) - 2)) if in_axes is None else tuple(in_axes)
    )
    if len(axes) != len(args):
        raise ValueError(
            f"in_axes has {len(axes)} entries for {len(args)} arguments; give one per "
            "argument (the default is None, ROW_KEY, 0, 0, …: params, key, rows)"
        )
    if axes.count(ROW_KEY) > 1:
        raise ValueError(f"in_axes={axes} marks several keys; expected at most one")
    return axes


def _agreed(what: str, numbers: set[int]) -> int:
    if len(numbers) != 1 or 0 in numbers:
        raise ValueError(
            f"the arguments have {sorted(numbers) or 'no'} {what}; expected one "
            "number, at least 1, for all of them: check in_axes"
        )
    return numbers.pop()


def map_rows(
    fn: Callable[..., Any],
    plan: RowPlan,
    leaves: Sequence[Any],
    first: jax.Array,
    num_rows: int,
    out_axes: Any,
    block_size: int | None,
) -> Any:
    """One device's rows, of which the first has number ``first``, through ``fn``."""

    def one(numbered_row: tuple[jax.Array, list[Any]]) -> Any:
        number, row = numbered_row
        remaining = iter(row)
        full = [
            leaf if axis is None else jnp.expand_dims(next(remaining), axis)
            for leaf, axis in zip(leaves, plan.row_axes, strict=True)
        ]
        args = list(jax.tree.unflatten(plan.structure, full))
        if plan.key_position is not None:
            args[plan.key_position] = jax.random.fold_in(
                args[plan.key_position], number
            )
        return _drop_row_axis(fn(*args), out_axes)

    rows = [
        jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, plan.row_axes, strict=True)
        if axis is not None
    ]
    xs = (first + jnp.arange(num_rows), rows)
    if block_size is None or block_size >= num_rows:
        result = jax.vmap(one)(xs)
    else:
        result = jax.lax.map(one, xs, batch_size=block_size)
    return _each(lambda leaf, axis: jnp.moveaxis(leaf, 0, axis), result, out_axes)


def _drop_row_axis(result: Any, out_axes: Any) -> Any:
    def drop(leaf: jax.Array, axis: int) -> jax.Array:
        if leaf.ndim <= axis or leaf.shape[axis] != 1:
            raise ValueError(
                f"for one row the function returned a leaf of shape {leaf.shape}; "
                f"expected size 1 on axis {axis}: return values per row, or set "
                "out_axes"
            )
        return jnp.squeeze(leaf, axis)

    return _each(drop, result, out_axes)


def _each(fn: Callable[[jax.Array, int], jax.Array], tree: Any, axes: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    mapped = []
    for leaf, axis in zip(leaves, broadcast_axes(axes, tree), strict=True):
        if axis is None:
            raise ValueError(
                "out_axes holds None; every output has rows, give their axis"
            )
        mapped.append(fn(leaf, axis))
    return jax.tree.unflatten(structure, mapped)


def cut_rows(tree: Any, axes: Any, num_rows: int) -> Any:
    """The first ``num_rows`` rows of every leaf."""

    def cut(leaf: jax.Array, axis: int) -> jax.Array:
        if leaf.shape[axis] == num_rows:
            return leaf
        return jax.lax.slice_in_dim(leaf, 0, num_rows, axis=axis)

    return _each(cut, tree, axes)


def pad_rows(leaf: jax.Array, axis: int, num_rows: int) -> jax.Array:
    """``leaf`` with rows added until there are ``num_rows``: its last one repeated.

    Typed keys are followed by other keys instead, since none may be used twice.
    """
    missing = num_rows - leaf.shape[axis]
    if missing == 0:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        shape = (*leaf.shape[:axis], missing, *leaf.shape[axis + 1 :])
        filler = jax.random.key(0, impl=str(jax.random.key_impl(leaf)))
        return jnp.concatenate([leaf, jax.random.split(filler, shape)], axis=axis)
    last = jax.lax.slice_in_dim(leaf, leaf.shape[axis] - 1, leaf.shape[axis], axis=axis)
    return jnp.concatenate([leaf, *[last] * missing], axis=axis)


def first_devices(devices: Sequence[Any] | None, number: int) -> Sequence[Any]:
    """The devices that a pmap over ``number`` of them uses.

    Raises:
        ValueError: if there are fewer.
    """
    devices = jax.devices() if devices is None else devices
    if number > len(devices):
        raise ValueError(
            f"arguments for {number} devices, there are {len(devices)}; reshape the "
            f"leading axis to {len(devices)} or fewer"
        )
    return devices[:number]
