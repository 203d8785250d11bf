"""Devices: functions that take any learner, sampler or model as it is and place it.

`data_parallel` splits the batch of an update, `shard_rows` chains, queries and rollouts,
`shard_seeds` whole training runs; each has a front with the calling convention of
``jax.pmap``. Numbers depend on the key, not on the device count, up to rounding.
"""

from emfuse_jax.parallel.data_parallel import data_parallel, pmap_update
from emfuse_jax.parallel.mesh import make_mesh, replicate, split
from emfuse_jax.parallel.multihost import (
    barrier,
    global_batch,
    host_rows,
    initialize_if_requested,
    is_coordinator,
)
from emfuse_jax.parallel.rows import ROW_KEY, pmap_rows, shard_rows
from emfuse_jax.parallel.seeds import pmap_seeds, shard_seeds

__all__ = [
    "ROW_KEY",
    "barrier",
    "data_parallel",
    "global_batch",
    "host_rows",
    "initialize_if_requested",
    "is_coordinator",
    "make_mesh",
    "pmap_rows",
    "pmap_seeds",
    "pmap_update",
    "replicate",
    "shard_rows",
    "shard_seeds",
    "split",
]
