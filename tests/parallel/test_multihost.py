import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from emfuse_jax.parallel import multihost
from emfuse_jax.parallel.mesh import make_mesh
from parallel._learners import energy_learner, train

HERE = pathlib.Path(__file__).parent


def test_one_host_has_all_rows_and_writes():
    assert multihost.host_rows(7) == slice(0, 7)
    assert multihost.is_coordinator()
    multihost.barrier("alone")
    assert not multihost.initialize_if_requested(False)


def test_shares_cover_the_rows_once():
    shares = [multihost._share(12, index, 3) for index in range(3)]
    assert [i for share in shares for i in range(12)[share]] == list(range(12))
    with pytest.raises(ValueError, match=r"13 rows .* 3 hosts; .* 12 and 15"):
        multihost._share(13, 0, 3)


def test_a_global_batch_is_the_rows_on_the_devices():
    rows = {"x": np.arange(16.0, dtype=np.float32)}
    batch = multihost.global_batch(rows, make_mesh({"data": 8}))
    assert len(batch["x"].sharding.device_set) == 8
    np.testing.assert_array_equal(batch["x"], rows["x"])
    with pytest.raises(ValueError, match=r"12 rows .* 8 devices; .* 8 and 16"):
        multihost.global_batch(np.zeros(12), make_mesh({"data": 8}))


def test_starting_too_late_or_without_a_cluster_names_the_fix():
    jax.block_until_ready(jax.numpy.zeros(1))
    with pytest.raises(RuntimeError, match="first thing"):
        multihost.initialize_if_requested(
            True, coordinator_address="127.0.0.1:1", num_processes=1, process_id=0
        )
    script = (
        "from emfuse_jax.parallel.multihost import initialize_if_requested as start\n"
        "try:\n    start(True)\n"
        "except ValueError as error:\n    print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=_environment(),
    )
    assert "give all three of coordinator_address" in found.stdout, found.stderr


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """Each holds half of the rows; the state is that of one process with all."""
    output = tmp_path / "params.npz"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    hosts = [
        subprocess.Popen(
            [sys.executable, HERE / "_two_hosts.py", str(rank), port, output],
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = []
    try:
        logs = [host.communicate(timeout=120)[0] for host in hosts]
    finally:
        for host in hosts:
            # A hung worker ignores SIGTERM: jax's preemption notifier catches it.
            host.kill()
            host.wait()
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(logs)
    rows = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    state, _ = jax.jit(lambda k, d: train(energy_learner(), k, d))(
        jax.random.key(3), rows
    )
    with np.load(output) as params:
        for name, value in state.params.items():
            np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-6)


def _environment():
    root = HERE.parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": path, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
