"""What the processes of one run do together."""

import jax
import numpy as np


def leads() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """A barrier; of one process, none."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"emfuse_jax checkpoint {name}")


def anywhere(flag: bool) -> bool:
    """Whether it holds in any process; the same answer in all."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
