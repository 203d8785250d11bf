"""Rows on many devices: the work is split and nothing is exchanged.

Chains, queries of the slice uncertainty and rollouts are *rows*: what happens to one
does not depend on the others. `shard_rows` gives each device its share of them, and row
``i`` the key ``fold_in(key, i)``. The numbers drawn therefore depend on the key alone,
not on how many devices there are, how rows are blocked, or how many rows follow.

`pmap_rows` is the same through ``jax.pmap`` (since jax 0.8 itself ``jit`` of
``shard_map``): rows come and results go as ``[device, …]``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from emfuse_jax.parallel._rows import ROW_KEY as ROW_KEY
from emfuse_jax.parallel._rows import (
    cut_rows,
    first_devices,
    map_rows,
    pad_rows,
    plan_rows,
)
from emfuse_jax.parallel.mesh import axis_size, context_mesh, free_axes, row_spec


def shard_rows(
    fn: Callable[..., Any],
    mesh: Mesh,
    *,
    axis: str = "data",
    in_axes: Sequence[Any] | None = None,
    out_axes: Any = 0,
    block_size: int | None = None,
) -> Callable[..., Any]:
    """``fn`` with its rows split over the devices of a mesh, without communication.

    ``fn`` is called with batches of one row (its row axes stay, with size 1) under
    ``jax.vmap``, so it needs no change but must treat rows independently: no mean over
    rows, no metrics. Call the result under ``jax.jit``. Rows that the devices cannot
    share evenly are padded with copies of the last one, which are cut off again. Where
    ``fn`` draws numbers they are not those of ``fn`` itself with this key, but the same
    on any mesh, that of one device included.

    Args:
        fn: for example ``model.predict``, ``model.uncertainty`` or a chain.
        mesh: from `make_mesh`.
        axis: the mesh axis that shares the rows; the others repeat the work.
        in_axes: per argument its row axis, None for what all rows share, `ROW_KEY` for
            the key; a row axis may be a tree of them, as in ``jax.vmap``. By default
            ``(None, ROW_KEY, 0, 0, …)``: params, key, rows. A `History` has its rows on
            axis 1.
        out_axes: the row axis of each output leaf, likewise.
        block_size: rows that run at once on a device, the blocks one after the other;
            None runs a device's rows together. A choice of speed and memory, not of
            numbers.

    Raises:
        ValueError: if the mesh has no such axis; and, when traced, if arguments and
            axes do not match, arguments disagree about the number of rows, or an output
            has no row axis.

    Example:
        >>> from emfuse_jax.parallel.mesh import make_mesh
        >>> mesh = make_mesh({"data": 1})
        >>> def noisy(params, key, position):
        ...     return position + params * jax.random.normal(key, position.shape)
        >>> shard_rows(noisy, mesh)(0.0, jax.random.key(0), jnp.arange(3.0))
        Array([0., 1., 2.], dtype=float32)
    """
    size = axis_size(mesh, axis)

    def mapped(*args: Any) -> Any:
        plan = plan_rows(args, in_axes)
        per_device = -(-plan.num_rows // size)
        leaves = [
            leaf if a is None else pad_rows(leaf, a, per_device * size)
            for leaf, a in zip(plan.leaves, plan.row_axes, strict=True)
        ]
        context = context_mesh(mesh)

        def local(*leaves: Any) -> Any:
            first = jax.lax.axis_index(axis) * per_device
            return map_rows(fn, plan, leaves, first, per_device, out_axes, block_size)

        result = jax.shard_map(
            local,
            mesh=context,
            in_specs=tuple(row_spec(a, axis) for a in plan.row_axes),
            out_specs=_out_specs(out_axes, axis),
            axis_names=free_axes(context),
            # The functions are opaque: their scans start from constants, which the
            # check of varying axes would refuse.
            check_vma=False,
        )(*leaves)
        return cut_rows(result, out_axes, plan.num_rows)

    return mapped


def pmap_rows(
    fn: Callable[..., Any],
    *,
    devices: Sequence[Any] | None = None,
    in_axes: Sequence[Any] | None = None,
    out_axes: Any = 0,
    block_size: int | None = None,
) -> Callable[..., Any]:
    """`shard_rows` called as ``jax.pmap`` is: row arguments are ``[device, …]``.

    Row axes are counted without the device axis: ``[device, lag, rows, obs]`` has its
    rows on axis 1. Shared arguments and the key have no device axis. The same rows with
    the same key give the same numbers as `shard_rows` does.

    Args:
        fn: as in `shard_rows`.
        devices: by default the first of them, as many as the arguments ask for.
        in_axes: as in `shard_rows`.
        out_axes: as in `shard_rows`.
        block_size: as in `shard_rows`.

    Returns:
        The compiled function; its outputs are ``[device, …]``.

    Raises:
        ValueError: when called, as `shard_rows`, or if arguments differ in their number
            of devices.

    Example:
        >>> import jax.numpy as jnp
        >>> double = pmap_rows(lambda x: 2 * x, devices=jax.devices()[:1], in_axes=(0,))
        >>> double(jnp.arange(3.0)[None]).tolist()  # [device, rows]
        [[0.0, 2.0, 4.0]]
    """

    def mapped(*args: Any) -> Any:
        plan = plan_rows(args, in_axes, lead=1)
        num_devices, rows = plan.num_devices, plan.num_rows

        def local(index: jax.Array, *leaves: Any) -> Any:
            return map_rows(fn, plan, leaves, index * rows, rows, out_axes, block_size)

        axes = tuple(None if a is None else 0 for a in plan.row_axes)
        return jax.pmap(
            local, in_axes=(0, *axes), devices=first_devices(devices, num_devices)
        )(jnp.arange(num_devices), *plan.leaves)

    return jax.jit(mapped)


def _out_specs(out_axes: Any, axis: str) -> Any:
    return jax.tree.map(
        lambda a: row_spec(a, axis), out_axes, is_leaf=lambda a: a is None
    )
