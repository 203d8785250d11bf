"""Whole training runs on many devices: the seeds are split and nothing is exchanged.

A run is a function ``train(key, *shared) -> anything``. `pmap_seeds` is the same
through ``jax.pmap`` (since jax 0.8 itself ``jit`` of ``shard_map``): keys come and
results go as ``[device, seed, …]``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec

from emfuse_jax.parallel._rows import cut_rows, first_devices, pad_rows
from emfuse_jax.parallel.mesh import axis_size, context_mesh


def shard_seeds(
    train_fn: Callable[..., Any], mesh: Mesh, *, axis: str = "seed"
) -> Callable[..., Any]:
    """Whole runs on many devices: ``train_fn(key, *shared)`` vmapped over keys, split.

    Call the result under ``jax.jit``. Over a mesh ``{"seed": m, "data": n}`` the run
    itself may use ``data_parallel(…, mesh)`` and ``shard_rows(…, mesh)``. Seeds that
    the devices cannot share evenly are padded with others that are thrown away, which
    costs no time: the busiest device would have had as many.

    Args:
        train_fn: ``(key, *shared) -> tree``, pure.
        mesh: from `make_mesh`.
        axis: the mesh axis that shares the seeds.

    Returns:
        ``(keys [seed], *shared) -> tree`` with a leading seed axis. Pass data sets as
        ``shared``, which every device holds whole, rather than closing over them.

    Raises:
        ValueError: if the mesh has no such axis; when called, if there are no keys, or
            if it is called outside ``jax.jit`` on a mesh with further axes.

    Example:
        >>> from emfuse_jax.parallel.mesh import make_mesh
        >>> runs = shard_seeds(jax.random.normal, make_mesh({"seed": 1}))
        >>> jax.jit(runs)(jax.random.split(jax.random.key(0), 5)).shape
        (5,)
    """
    size = axis_size(mesh, axis)

    def mapped(keys: jax.Array, *shared: Any) -> Any:
        num_seeds = _count_seeds(keys)
        if mesh.size != size and not isinstance(keys, Tracer):
            raise ValueError(
                f"seeds over axis {axis!r} of a mesh {dict(mesh.shape)} need to be "
                "compiled: call jax.jit(shard_seeds(…))(keys)"
            )
        keys = pad_rows(keys, 0, -(-num_seeds // size) * size)
        result = jax.shard_map(
            jax.vmap(train_fn, in_axes=(0, *[None] * len(shared))),
            mesh=context_mesh(mesh),
            in_specs=(PartitionSpec(axis), *[PartitionSpec()] * len(shared)),
            out_specs=PartitionSpec(axis),
            # The other axes stay with the compiler, for data_parallel inside a run.
            axis_names={axis},
            check_vma=False,
        )(keys, *shared)
        return cut_rows(result, 0, num_seeds)

    return mapped


def pmap_seeds(
    train_fn: Callable[..., Any], *, devices: Sequence[Any] | None = None
) -> Callable[..., Any]:
    """`shard_seeds` called as ``jax.pmap`` is: ``keys [device, seed]``, compiled.

    Args:
        train_fn: ``(key, *shared) -> tree``, pure.
        devices: by default the first of them, one per leading entry of ``keys``.

    Returns:
        ``(keys, *shared) -> tree`` with leading axes ``[device, seed]``.

    Raises:
        ValueError: when called, if ``keys`` has fewer than two axes or there are too
            few devices.

    Example:
        >>> run = pmap_seeds(lambda key: jax.random.uniform(key), devices=jax.devices()[:1])
        >>> run(jax.random.split(jax.random.key(0), 3)[None]).shape  # [device, seed]
        (1, 3)
    """

    def mapped(keys: jax.Array, *shared: Any) -> Any:
        if keys.ndim < 2:
            raise ValueError(
                f"keys of shape {keys.shape}; expected [device, seed]: "
                "jax.random.split(key, (jax.device_count(), seeds_per_device))"
            )
        axes = (0, *[None] * len(shared))
        runs = jax.vmap(train_fn, in_axes=axes)
        return jax.pmap(
            runs, in_axes=axes, devices=first_devices(devices, keys.shape[0])
        )(keys, *shared)

    return jax.jit(mapped)


def _count_seeds(keys: jax.Array) -> int:
    if keys.ndim == 0 or keys.shape[0] == 0:
        raise ValueError(
            f"keys of shape {keys.shape}; expected one key per seed: "
            "jax.random.split(key, num_seeds)"
        )
    return keys.shape[0]
