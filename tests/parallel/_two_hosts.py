"""One of two hosts that train together: ``python _two_hosts.py RANK PORT OUTPUT``."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"

import jax
import jax.numpy as jnp
import numpy as np
from _learners import energy_learner, train

from emfuse_jax.parallel.data_parallel import data_parallel
from emfuse_jax.parallel.mesh import make_mesh
from emfuse_jax.parallel.multihost import (
    barrier,
    global_batch,
    host_rows,
    initialize_if_requested,
    is_coordinator,
)

jax.config.update("jax_num_cpu_devices", 2)


def main(rank, port, output):
    several = initialize_if_requested(
        True,
        coordinator_address=f"127.0.0.1:{port}",
        num_processes=2,
        process_id=rank,
        timeout=60,
    )
    assert several
    assert jax.device_count() == 4
    rows = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    mesh = make_mesh({"data": -1})
    mine = host_rows(len(rows))
    assert mine == slice(16 * rank, 16 * (rank + 1))
    # This host's rows only: the other half is poisoned, and would be seen.
    rows[: mine.start] = np.nan
    rows[mine.stop :] = np.nan
    batch = global_batch(rows[mine], mesh)
    learner = data_parallel(energy_learner(), mesh)
    state, _ = jax.jit(lambda k, d: train(learner, k, d))(jax.random.key(3), batch)
    if is_coordinator():
        np.savez(output, **{k: np.asarray(v) for k, v in state.params.items()})
    barrier("written")
    assert os.path.exists(output)
    assert jnp.isfinite(state.params["last"].addressable_shards[0].data).all()
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
