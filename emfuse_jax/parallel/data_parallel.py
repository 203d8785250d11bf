"""Training on many devices: the batch is split, the state is not.

`data_parallel` says only where arrays live. The update it returns is still the
learner's own, over the whole batch, so it computes what one device would, up to the
order of float sums: means, normalisations and in-batch negatives see every row, and the
compiler inserts the sums of gradients over devices. There is no ``pmean`` to forget and
no gradient that is N times too large (which Adam would hide).

`pmap_update` is the same behind the calling convention of ``jax.pmap``: batches come as
``[device, rows, …]``.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding

from emfuse_jax.base import Metrics, State
from emfuse_jax.parallel.mesh import (
    axis_size,
    broadcast_axes,
    make_mesh,
    replicate,
    row_spec,
)

AnyLearner = TypeVar("AnyLearner", bound=Any)
"""A `Learner`, or a NamedTuple with the same two fields: `Policy`, `Dynamics`."""


def data_parallel(
    learner: AnyLearner, mesh: Mesh, *, axis: str = "data", batch_axes: Any = 0
) -> AnyLearner:
    """The same learner, whose ``update`` splits its batch over the devices of a mesh.

    Call the update under ``jax.jit`` (`loops.fit` does). ``init`` puts a copy of the
    new state on every device; a state from elsewhere goes through `mesh.replicate`
    first, or the first update is compiled twice.

    Args:
        learner: anything with ``init(…) -> state``, ``update(key, state, batch) ->
            (state, metrics)`` and ``_replace``.
        mesh: from `make_mesh`; axes other than ``axis`` repeat the work, or hold seeds
            (see `shard_seeds`).
        axis: the mesh axis that shares the batch.
        batch_axes: which axis of each batch leaf counts rows: a number, or a tree of
            numbers (None: not split) that is a prefix of the batch, as in ``jax.vmap``.

    Raises:
        ValueError: if the mesh has no such axis; and, when the update is traced, if its
            size does not divide the number of rows.

    Example:
        >>> import jax.numpy as jnp
        >>> from emfuse_jax.base import Learner
        >>> counter = Learner(
        ...     lambda key: jnp.zeros(()),
        ...     lambda key, state, batch: (state + batch.mean(), {}),
        ... )
        >>> parallel = data_parallel(counter, make_mesh({"data": 1}))
        >>> key, batch = jax.random.key(0), jnp.arange(4.0)
        >>> state, _ = jax.jit(parallel.update)(key, parallel.init(key), batch)
        >>> float(state)
        1.5
    """
    size = axis_size(mesh, axis)

    def init(*args: Any, **kwargs: Any) -> State:
        return replicate(learner.init(*args, **kwargs), mesh)

    def update(key: jax.Array, state: State, batch: Any) -> tuple[State, Metrics]:
        batch = _constrain(batch, batch_axes, mesh, axis, size)
        state, metrics = learner.update(key, replicate(state, mesh), batch)
        return replicate(state, mesh), replicate(metrics, mesh)

    return learner._replace(init=init, update=update)


def pmap_update(
    learner: Any,
    *,
    devices: Sequence[Any] | None = None,
    batch_axes: Any = 0,
    donate_state: bool = False,
) -> Callable[[jax.Array, State, Any], tuple[State, Metrics]]:
    """``learner.update`` as ``jax.pmap`` would be called, compiled, gradients averaged.

    A ``pmean`` cannot be put inside a learner that someone else wrote, so this joins
    the devices' rows into one batch and runs `data_parallel` on it. The rows stay on
    the devices that hold them. State and metrics have no device axis (pmap's
    ``in_axes=None`` and ``out_axes=None``).

    Args:
        learner: as in `data_parallel`.
        devices: one per leading entry of a batch; all of them by default.
        batch_axes: the row axis of each leaf without its device axis: 0 for
            ``[device, rows, …]``, 1 for ``[device, lag, rows, …]``.
        donate_state: let the new state take over the old one's memory.

    Returns:
        ``update(key, state, batch) -> (state, metrics)``.

    Raises:
        ValueError: when called, if a batch leaf's leading axis is not the number of
            devices.

    Example:
        >>> import jax.numpy as jnp
        >>> from emfuse_jax.base import Learner
        >>> mean = Learner(
        ...     init=lambda key: jnp.zeros(()),
        ...     update=lambda key, state, batch: (batch.mean(), {"count": jnp.ones(())}),
        ... )
        >>> update = pmap_update(mean, devices=jax.devices()[:1])
        >>> state, metrics = update(jax.random.key(0), jnp.zeros(()), jnp.arange(4.0)[None])
        >>> float(state)  # of the rows of all devices; no device axis
        1.5
    """
    mesh = make_mesh({"data": -1}, devices=devices)
    parallel = data_parallel(learner, mesh, batch_axes=batch_axes)

    def update(key: jax.Array, state: State, batch: Any) -> tuple[State, Metrics]:
        return parallel.update(key, state, _join(batch, batch_axes, mesh.size))

    return jax.jit(update, donate_argnums=1 if donate_state else ())


def _constrain(batch: Any, batch_axes: Any, mesh: Mesh, axis: str, size: int) -> Any:
    axes = broadcast_axes(batch_axes, batch)
    leaves, structure = jax.tree.flatten(batch)
    for leaf, row_axis in zip(leaves, axes, strict=True):
        if row_axis is None:
            continue
        if leaf.ndim <= row_axis:
            raise ValueError(
                f"a batch leaf of shape {leaf.shape} has no row axis {row_axis}; set "
                "batch_axes (None for what is not a row)"
            )
        if leaf.shape[row_axis] % size:
            rows = leaf.shape[row_axis]
            raise ValueError(
                f"a batch of {rows} rows cannot be shared evenly by {size} devices on "
                f"axis {axis!r}; nearest sizes: {rows // size * size} and "
                f"{-(-rows // size) * size}"
            )
    return jax.tree.unflatten(
        structure,
        [
            jax.lax.with_sharding_constraint(
                leaf, NamedSharding(mesh, row_spec(row_axis, axis))
            )
            for leaf, row_axis in zip(leaves, axes, strict=True)
        ],
    )


def _join(batch: Any, batch_axes: Any, num_devices: int) -> Any:
    """``[device, …, rows, …]`` to ``[…, device * rows, …]``, device by device."""
    leaves, structure = jax.tree.flatten(batch)
    joined = []
    for leaf, row_axis in zip(leaves, broadcast_axes(batch_axes, batch), strict=True):
        if leaf.ndim == 0 or leaf.shape[0] != num_devices:
            raise ValueError(
                f"a batch leaf of shape {leaf.shape} for {num_devices} devices; "
                f"expected [{num_devices}, rows, …]: reshape it, or pass devices="
            )
        if row_axis is None:
            raise ValueError(
                "batch_axes=None has no meaning here: every leaf has a device axis; "
                "use data_parallel for leaves that all devices share"
            )
        moved = jax.numpy.moveaxis(leaf, 0, row_axis)
        shape = moved.shape
        joined.append(moved.reshape((*shape[:row_axis], -1, *shape[row_axis + 2 :])))
    return jax.tree.unflatten(structure, joined)
