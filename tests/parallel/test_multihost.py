import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from emfuse_jax import artifacts
from emfuse_jax.parallel import (
    ROW_KEY,
    data_parallel,
    make_mesh,
    multihost,
    shard_rows,
    split,
)
from parallel._work import (
    PARAMS,
    chain,
    dispersion,
    energy_learner,
    rows,
    slices,
    train,
)

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


def test_a_coordinator_that_is_not_there_is_named_before_jax_aborts():
    others = {"num_processes": 2, "process_id": 1, "timeout": 1}
    with socket.socket() as deaf:
        # Bound, so that nobody else is there, but not listening.
        deaf.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(TimeoutError, match=f"not reached at {address} within 1 s"):
            multihost.initialize_if_requested(
                True, coordinator_address=address, **others
            )
    for wrong in ("localhost", ":1", "localhost:http", "localhost:70000"):
        with pytest.raises(ValueError, match=r"must be 'host:port'"):
            multihost.initialize_if_requested(True, coordinator_address=wrong, **others)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """What two processes of two devices each have made, in a folder."""
    folder = tmp_path_factory.mktemp("hosts")
    mesh = make_mesh({"data": 8})
    learner = data_parallel(energy_learner(), mesh)
    batch = split(rows(), mesh)
    state, _ = jax.jit(lambda k, d: train(learner, k, d, 2))(jax.random.key(3), batch)
    artifacts.save(folder / "eight", 2, {"state": state, "rows": batch})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, HERE / "_two_hosts.py", str(rank), port, folder],
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = []
    try:
        logs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            # A hung worker ignores SIGTERM: jax's preemption notifier catches it.
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)
    return folder


@pytest.fixture(scope="module")
def results(hosts):
    with np.load(hosts / "results.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def alone():
    """State and metrics of three steps, on one device."""
    return jax.jit(lambda k, d: train(energy_learner(), k, d))(
        jax.random.key(3), rows()
    )


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_take_the_gradients_and_steps_of_one(results, alone):
    """Each holds half of the rows."""
    state, metrics = alone
    for name, expected in {**state.params, **metrics}.items():
        close(results[name], expected)
    assert np.max(np.abs(metrics["d_last"])) > 1e-2


@pytest.mark.slow
def test_two_processes_draw_the_numbers_of_one(results):
    one = make_mesh({"data": 1})
    draw = shard_rows(
        lambda k, x: jax.random.normal(k, x.shape), one, in_axes=(ROW_KEY, 0)
    )
    expected = jax.jit(draw)(jax.random.key(5), rows())
    np.testing.assert_array_equal(results["numbers"], expected)
    assert len(np.unique(results["numbers"])) == expected.size
    chains = jax.jit(shard_rows(chain, one))(PARAMS, jax.random.key(5), rows())
    close(results["chains"], chains)


@pytest.mark.slow
def test_two_processes_find_the_uncertainties_of_one(results):
    expected = dispersion(PARAMS, slices())
    close(results["uncertainty"], expected)
    assert np.ptp(expected) > 1e-3  # rows in another order would show


@pytest.mark.slow
def test_a_run_of_eight_devices_resumes_on_two_processes(results, alone):
    for name, expected in alone[0].params.items():
        close(results[f"resumed_{name}"], expected)
    start = energy_learner().init(jax.random.key(0)).params
    assert any(np.abs(start[k] - v).max() > 1e-3 for k, v in alone[0].params.items())


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_of_two_processes_resumes_on_one(hosts, alone, devices):
    mesh = make_mesh({"data": devices})
    learner = data_parallel(energy_learner(), mesh)
    like = {"state": learner.init(jax.random.key(0)), "rows": split(rows(), mesh)}
    found = artifacts.restore_latest(hosts / "four", like)
    assert found.step == 3
    assert artifacts.best_step(hosts / "four") == 3
    np.testing.assert_array_equal(found.tree["rows"], rows())
    for name, expected in alone[0].params.items():
        close(found.tree["state"].params[name], expected)
        # The digest of what lay on two hosts is that of the whole arrays.
    digest = artifacts.read_meta(hosts / "four", 3)["digest"]
    assert artifacts.tree_digest(found.tree) == digest
    following = jax.jit(lambda s, d: train(learner, jax.random.key(3), d, 1, s, 3))
    state, _ = following(found.tree["state"], found.tree["rows"])
    assert int(state.steps) == 4


def _environment():
    root = HERE.parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": path, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
