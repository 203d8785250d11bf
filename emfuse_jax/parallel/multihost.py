"""Several hosts: start, each host's share of the data, who writes, and a barrier.

``jax.distributed`` does the work (it finds SLURM, GKE, TPU pods and Open MPI by
itself); once it has started, ``jax.devices()`` are the devices of all hosts and every
function of this package works unchanged, each host calling it with the same arguments
and its own rows made global by `global_batch`.
"""

import socket
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from emfuse_jax.parallel.mesh import axis_size, row_spec


def initialize_if_requested(
    requested: bool,
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> bool:
    """Joins this process to the others, if the user asked for it.

    Call it from a ``--distributed`` flag, first of all: never on import, and before any
    computation.

    Args:
        requested: the flag; False does nothing.
        coordinator_address: ``host:port`` of process 0; None lets jax ask the cluster.
        num_processes: likewise.
        process_id: likewise.
        timeout: seconds to wait for process 0, and then for the others.

    Returns:
        Whether there are several processes now.

    Raises:
        RuntimeError: if jax has already computed something.
        ValueError: if there is no cluster to ask and no address was given, or that is not
            ``host:port``.
        TimeoutError: if process 0 cannot be reached at the given address.

    Example:
        >>> initialize_if_requested(False)  # a program without its --distributed flag
        False
    """
    if not requested:
        return False
    if coordinator_address is not None and process_id:
        _wait_for_coordinator(coordinator_address, timeout)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes=num_processes,
            process_id=process_id,
            initialization_timeout=timeout,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"joining the other processes failed: {error}. It has to be the first "
            "thing that a program asks of jax, once per process"
        ) from error
    except ValueError as error:
        raise ValueError(
            "no cluster that jax knows was found; give all three of "
            "coordinator_address ('host:port' of process 0), num_processes and "
            f"process_id, got {coordinator_address!r}, {num_processes} and "
            f"{process_id}; or leave out the request to run on this machine alone"
        ) from error
    return jax.process_count() > 1


def _wait_for_coordinator(address: str, timeout: int) -> None:
    """Until process 0 listens: jax aborts a process that waits in vain."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(
            f"coordinator_address={address!r} must be 'host:port' of process 0, such as "
            "'10.0.0.1:1234'"
        )
    deadline = time.monotonic() + timeout
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            socket.create_connection((host.strip("[]"), int(port)), left).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"process 0 was not reached at {address} within {timeout} s "
                    f"({error}); start it too, and give all processes its host and a free "
                    "port of it that they can reach"
                ) from error
            time.sleep(0.1)


def is_coordinator() -> bool:
    """Whether this process is the one that writes files and prints.

    Example:
        >>> is_coordinator()  # a single process is
        True
    """
    return jax.process_index() == 0


def host_rows(num_rows: int) -> slice:
    """This host's rows of ``num_rows``: contiguous, in the order of the hosts.

    Raises:
        ValueError: if the hosts cannot share the rows evenly.

    Example:
        >>> host_rows(8)
        slice(0, 8, None)
    """
    return _share(num_rows, jax.process_index(), jax.process_count())


def global_batch(
    rows: Any, mesh: Mesh, *, axis: str = "data", row_axis: int = 0
) -> Any:
    """One global tree from each host's rows, without moving any.

    Args:
        rows: host arrays; the leaves of ``data[host_rows(num_rows)]``.
        mesh: over the devices of all hosts.
        axis: the mesh axis that shares the rows.
        row_axis: the leaves' axis that counts rows.

    Returns:
        The tree with ``process_count`` times as many rows.

    Raises:
        ValueError: if the mesh has no such axis, or its local devices cannot share the
            rows evenly.

    Example:
        >>> import numpy as np
        >>> from emfuse_jax.parallel import make_mesh
        >>> batch = global_batch({"x": np.ones((8, 3))}, make_mesh({"data": 1}))
        >>> batch["x"].shape, tuple(batch["x"].sharding.spec)  # of one host
        ((8, 3), ('data',))
    """
    sharding = NamedSharding(mesh, row_spec(row_axis, axis))
    local = max(1, axis_size(mesh, axis) // jax.process_count())

    def put(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.shape[row_axis] % local:
            raise ValueError(
                f"{leaf.shape[row_axis]} rows on this host cannot be shared evenly by "
                f"its {local} devices; nearest sizes: "
                f"{leaf.shape[row_axis] // local * local} and "
                f"{-(-leaf.shape[row_axis] // local) * local}"
            )
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(put, rows)


def barrier(name: str) -> None:
    """Waits until every host has come here; ``name`` must be the same on all.

    Example:
        >>> barrier("saved")  # one process waits for nobody
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _share(num_rows: int, index: int, count: int) -> slice:
    if num_rows % count:
        raise ValueError(
            f"{num_rows} rows cannot be shared evenly by {count} hosts; nearest sizes: "
            f"{num_rows // count * count} and {-(-num_rows // count) * count}"
        )
    share = num_rows // count
    return slice(index * share, (index + 1) * share)
