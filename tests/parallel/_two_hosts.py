"""One of two hosts that work together: ``python _two_hosts.py RANK PORT FOLDER``.

FOLDER holds ``eight``, a checkpoint that one process made on eight devices. The hosts
leave ``results.npz`` and a checkpoint of their own, ``four``.
"""

import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"

import jax
import numpy as np

# Sources of the tests, beside this file.
from _work import PARAMS, chain, dispersion, energy_learner, rows, slices, train
from jax.experimental.multihost_utils import process_allgather

from emfuse_jax import artifacts
from emfuse_jax.parallel import (
    ROW_KEY,
    barrier,
    data_parallel,
    global_batch,
    host_rows,
    initialize_if_requested,
    is_coordinator,
    make_mesh,
    replicate,
    shard_rows,
)

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)


def share(array, mesh, row_axis=0):
    """The global array; of this one only the host's own rows are not poisoned."""
    mine = host_rows(array.shape[row_axis])
    return global_batch(
        np.take(array, range(mine.start, mine.stop), row_axis), mesh, row_axis=row_axis
    )


def main(rank, port, folder):
    several = initialize_if_requested(
        True,
        coordinator_address=f"127.0.0.1:{port}",
        num_processes=2,
        process_id=rank,
        timeout=60,
    )
    assert several
    assert jax.device_count() == 4
    assert host_rows(32) == slice(16 * rank, 16 * (rank + 1))
    mesh = make_mesh({"data": -1})
    batch = share(rows(), mesh)
    assert [s.data.shape for s in batch.addressable_shards] == [(8, 3)] * 2

    learner = data_parallel(energy_learner(), mesh)
    run = jax.jit(lambda k, d: train(learner, k, d))
    state, metrics = run(jax.random.key(3), batch)
    chains = shard_rows(chain, mesh)
    draw = shard_rows(lambda k, x: jax.random.normal(k, x.shape), mesh,
                      in_axes=(ROW_KEY, 0))  # fmt: skip
    queries = shard_rows(dispersion, mesh, in_axes=(None, 1))
    results = {
        **state.params,
        **metrics,
        "chains": jax.jit(chains)(PARAMS, jax.random.key(5), batch),
        "numbers": jax.jit(draw)(jax.random.key(5), batch),
        "uncertainty": jax.jit(queries)(PARAMS, share(slices(), mesh, row_axis=1)),
    }

    # Rows that lie on both hosts are in the checkpoint too.
    saved = {"state": state, "rows": batch}
    artifacts.save(folder / "four", 3, saved, score=1.0)
    artifacts.save(folder / "four", 3, saved)  # again: nothing to do

    like = replicate(energy_learner().init(jax.random.key(0)), mesh)
    found = artifacts.restore_latest(folder / "eight", {"state": like, "rows": batch})
    assert found.step == 2
    resumed = jax.jit(lambda s, d: train(learner, jax.random.key(3), d, 1, s, 2))
    state, _ = resumed(found.tree["state"], found.tree["rows"])
    results |= {f"resumed_{name}": value for name, value in state.params.items()}

    results = {k: process_allgather(v, tiled=True) for k, v in results.items()}
    if is_coordinator():
        np.savez(folder / "results.npz", **results)
    barrier("written")
    assert (folder / "results.npz").exists()
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]))
