"""What jax does with devices that surprises, each beside what this package does.

The first half of a test shows the trap as it is, so that the second half would fail where
the package fell into it.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from emfuse_jax.base import Learner
from emfuse_jax.parallel import (
    ROW_KEY,
    data_parallel,
    make_mesh,
    pmap_update,
    replicate,
    shard_rows,
    split,
)
from parallel._work import rows

W = np.ones(3, np.float32)


def loss(w, batch):
    return jnp.mean(jnp.square(batch @ w))


def update(key, w, batch):
    """One step of plain gradient descent at rate one."""
    return w - jax.grad(loss)(w, batch), {}


LEARNER = Learner(lambda key: jnp.asarray(W), update)


def test_shard_map_sums_gradients_that_are_then_averaged():
    """check_vma: differentiating through an unvarying argument already sums over devices."""
    mesh, batch = make_mesh({"data": 8}), rows()
    gradient = jax.grad(loss)(W, batch)

    def local(w, batch):
        return jax.lax.pmean(jax.grad(loss)(w, batch), "data")

    by_hand = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=True
    )
    np.testing.assert_allclose(jax.jit(by_hand)(W, batch), 8 * gradient, rtol=1e-5)

    lifted = jax.jit(data_parallel(LEARNER, mesh).update)
    fronts = {
        "data_parallel": lifted(jax.random.key(0), W, batch)[0],
        "pmap": pmap_update(LEARNER)(jax.random.key(0), W, batch.reshape(8, 4, 3))[0],
    }
    for name, following in fronts.items():
        np.testing.assert_allclose(W - following, gradient, rtol=1e-5, err_msg=name)


def test_the_axes_that_jax_makes_are_explicit():
    """On such a mesh, indexing rows, as every sampler of batches does, is an error."""
    plain = jax.make_mesh((8,), ("data",))
    assert plain.axis_types == (AxisType.Explicit,)

    @jax.jit
    def pick(batch):
        return batch[jnp.array([1, 5, 7])]

    with pytest.raises(Exception, match="out_sharding"):
        pick(jax.device_put(rows(), NamedSharding(plain, P("data"))))
    mesh = make_mesh({"data": 8})
    np.testing.assert_array_equal(pick(split(rows(), mesh)), rows()[[1, 5, 7]])
    for place in (
        lambda: data_parallel(LEARNER, plain),
        lambda: shard_rows(loss, plain),
        lambda: split(rows(), plain),
    ):
        with pytest.raises(ValueError, match=r"'data' is of type Explicit.*make_mesh"):
            place()


def test_keys_by_device_draw_other_numbers_on_other_meshes():
    """``fold_in(key, axis_index)``: a sample per number of devices."""
    zeros = np.zeros((8, 3), np.float32)

    def usual(key, x):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        return x + jax.random.normal(key, x.shape)

    def drawn(key, x):
        return x + jax.random.normal(key, x.shape)

    by_device, by_row = [], []
    for devices in (4, 8):
        mesh = make_mesh({"data": devices})
        naive = jax.shard_map(
            usual, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
        )
        by_device.append(np.asarray(jax.jit(naive)(jax.random.key(0), zeros)))
        ours = shard_rows(drawn, mesh, in_axes=(ROW_KEY, 0))
        by_row.append(np.asarray(jax.jit(ours)(jax.random.key(0), zeros)))
    assert not np.allclose(*by_device)
    np.testing.assert_array_equal(*by_row)


def test_device_put_shares_the_buffer_that_is_then_donated():
    mesh = make_mesh({"data": 8})
    consume = jax.jit(jnp.sin, donate_argnums=0)
    mine = jnp.arange(8.0)
    consume(jax.device_put(mine, NamedSharding(mesh, P())))
    assert mine.is_deleted()

    mine = jnp.arange(8.0)
    for place in (replicate, split):
        placed = place(mine, mesh)
        consume(placed)
        assert placed.is_deleted()
        np.testing.assert_array_equal(mine, np.arange(8.0))


STEPS = """
import sys
import jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 8)
from emfuse_jax.base import Learner
from emfuse_jax.loops import fit
from emfuse_jax.parallel import data_parallel, make_mesh
def update(key, w, batch):
    return w - 1e-3 * jax.grad(lambda w: jnp.mean(jnp.square(batch @ w)))(w), {"w": w}
learner = data_parallel(Learner(lambda key: jnp.ones(3), update), make_mesh({"data": 8}))
key, batch = jax.random.key(0), jnp.ones((32, 3))
if sys.argv[1] == "fit":
    fit(key, learner, learner.init(key), lambda key, data: data, 200, data=batch,
        chunk=1, on_chunk=lambda *_: None)
else:
    step, state = jax.jit(learner.update), learner.init(key)
    for _ in range(200):
        state, _ = step(key, state, batch)
    jax.block_until_ready(state)
print("all steps done")
"""


@pytest.mark.parametrize(
    ("loop", "threads"), [("fit", None), ("unblocked", "16")], ids=["fit", "NPROC=16"]
)
def test_many_steps_do_not_wait_for_each_other_forever(loop, threads):
    """Exchanges of more than about 64 steps in flight have been seen to deadlock a small
    thread pool; the process aborts after a minute. Whether it happens depends on machine
    and program, so this one can only show that it does not: `fit` waits for each chunk, and
    needs no larger pool; a loop that does not wait has ``NPROC``, as the guide says."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")
    }
    environment |= {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    environment |= {} if threads is None else {"NPROC": threads}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, loop],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert "all steps done" in done.stdout, done.stderr
