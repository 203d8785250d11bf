"""Meshes, and putting trees on them.

A mesh names the axes over which devices share work: ``"data"`` for the rows of a
training batch, chains, queries and rollouts, ``"seed"`` for whole training runs. Both
together are one mesh with two axes. Every axis is of type ``Auto``: code stays global,
the compiler splits it (``jax.make_mesh`` alone makes ``Explicit`` ones, which change
the types of arrays).

References:
    Sharded computation, https://docs.jax.dev/en/latest/sharded-computation.html
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(
    axis_sizes: Mapping[str, int], *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over the first devices, in the order of ``axis_sizes``.

    Args:
        axis_sizes: devices per axis name; at most one size may be -1, "all that
            remain".
        devices: what to build it from; all devices of all hosts by default.

    Raises:
        ValueError: if there are too few devices, a size is not positive, or a mesh over
            several hosts would leave devices out.

    Example:
        >>> dict(make_mesh({"seed": 1, "data": 1}).shape)
        {'seed': 1, 'data': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _fill(dict(axis_sizes), len(devices))
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ValueError(
            f"a mesh of {sizes} needs {needed} devices, there are {len(devices)} "
            f"({devices[0].platform}); use smaller axes, -1 for all that remain, or, "
            f"to try it on a CPU, jax.config.update('jax_num_cpu_devices', {needed}) "
            "before the first computation"
        )
    if jax.process_count() > 1 and needed != len(devices):
        raise ValueError(
            f"a mesh of {sizes} takes {needed} of {len(devices)} devices on "
            f"{jax.process_count()} hosts; a host outside the mesh would hang the "
            "others: let one axis be -1"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:needed],
    )


def axis_size(mesh: Mesh, axis: str) -> int:
    """The number of devices along ``axis``.

    Raises:
        ValueError: if the mesh has no such axis, or one of type ``Explicit``, which
            ``jax.make_mesh`` makes unless told otherwise.

    Example:
        >>> axis_size(make_mesh({"data": 1}), "data")
        1
    """
    if axis not in mesh.shape:
        raise ValueError(
            f"the mesh has no axis {axis!r}, only {list(mesh.shape)}; name one of "
            f"these or add it: make_mesh({{{axis!r}: …}})"
        )
    axis_type = mesh.axis_types[mesh.axis_names.index(axis)]
    if axis_type == AxisType.Explicit:
        raise ValueError(
            f"mesh axis {axis!r} is of type Explicit, which changes the types of arrays; "
            "use emfuse_jax.parallel.make_mesh, or pass axis_types=(AxisType.Auto, …) to "
            "jax.make_mesh"
        )
    return mesh.shape[axis]


def row_spec(row_axis: int | None, axis: str) -> PartitionSpec:
    """The partition of an array whose dimension ``row_axis`` is split over ``axis``.

    None is an array that every device holds whole.

    Example:
        >>> row_spec(1, "data")
        P(None, 'data')
    """
    if row_axis is None:
        return PartitionSpec()
    return PartitionSpec(*[None] * row_axis, axis)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of ``tree`` on every device of the mesh; under a trace, a constraint.

    A copy, since ``jax.device_put`` may share a buffer with its argument, and donating
    the one would then delete the other.

    Example:
        >>> replicate(jnp.arange(3), make_mesh({"data": -1})).sharding.is_fully_replicated
        True
    """
    return _put(tree, NamedSharding(mesh, PartitionSpec()))


def split(tree: Any, mesh: Mesh, *, axis: str = "data", row_axis: int = 0) -> Any:
    """A copy of ``tree`` whose leaves are split along ``row_axis`` over a mesh axis.

    Raises:
        ValueError: if the axis is unknown or does not divide the rows.

    Example:
        >>> mesh = make_mesh({"data": 1})
        >>> split(jnp.arange(4), mesh).sharding.spec
        P('data',)
    """
    size = axis_size(mesh, axis)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        rows = jnp.shape(leaf)[row_axis]
        if rows % size:
            raise ValueError(
                f"leaf{jax.tree_util.keystr(path)} has {rows} rows on axis {row_axis}, "
                f"which {size} devices cannot share evenly; nearest sizes: "
                f"{rows // size * size} and {-(-rows // size) * size}"
            )
    return _put(tree, NamedSharding(mesh, row_spec(row_axis, axis)))


def context_mesh(mesh: Mesh) -> Mesh | AbstractMesh:
    """The mesh to name inside another mapped function: that function's own, if any.

    Example:
        >>> mesh = make_mesh({"data": 1})
        >>> context_mesh(mesh) is mesh  # inside shard_map it would be that function's
        True
    """
    ambient = jax.sharding.get_abstract_mesh()
    return mesh if ambient.empty else ambient


def free_axes(mesh: Mesh | AbstractMesh) -> set[str]:
    """The axes that no surrounding mapped function has taken.

    Example:
        >>> free_axes(make_mesh({"seed": 1, "data": 1})) == {"seed", "data"}
        True
    """
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, axis_type in types if axis_type != AxisType.Manual}


def broadcast_axes(axes: Any, tree: Any) -> list[int | None]:
    """The row axis of each leaf of ``tree``, from a prefix tree as in ``jax.vmap``.

    Raises:
        ValueError: if ``axes`` is not a prefix of ``tree``, or holds a negative number.

    Example:
        >>> broadcast_axes((0, None), (jnp.zeros(2), {"a": jnp.zeros(2), "b": jnp.zeros(2)}))
        [0, None, None]
    """

    def is_leaf(x: Any) -> bool:
        return x is None

    try:
        full = jax.tree.broadcast(axes, tree, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            f"the row axes {axes} do not fit an argument of structure "
            f"{jax.tree.structure(tree)}; give one number, None, or a tree of them "
            "with the structure of the argument"
        ) from error
    flat = jax.tree.leaves(full, is_leaf=is_leaf)
    for entry in flat:
        if entry is not None and (not isinstance(entry, int) or entry < 0):
            raise ValueError(f"row axis {entry!r}; expected None or a number from 0")
    return flat


def _fill(sizes: dict[str, int], num_devices: int) -> dict[str, int]:
    if not sizes:
        raise ValueError("a mesh needs an axis; for example make_mesh({'data': -1})")
    free = [name for name, size in sizes.items() if size == -1]
    bad = [name for name, size in sizes.items() if size != -1 and size < 1]
    if bad or len(free) > 1:
        raise ValueError(
            f"axis sizes {sizes}; expected positive numbers and at most one -1"
        )
    if free:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if num_devices % fixed:
            raise ValueError(
                f"axis sizes {sizes}: {fixed} does not divide the {num_devices} "
                f"devices; choose sizes that do, or write {free[0]!r} as a number"
            )
        sizes[free[0]] = num_devices // fixed
    return sizes


def _put(tree: Any, sharding: NamedSharding) -> Any:
    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, Tracer):
            return jax.lax.with_sharding_constraint(leaf, sharding)
        return jax.device_put(jnp.copy(leaf), sharding)

    return jax.tree.map(put, tree)
