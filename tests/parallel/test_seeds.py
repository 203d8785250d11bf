import chex
import jax
import jax.numpy as jnp
import pytest

from emfuse_jax.parallel.data_parallel import data_parallel
from emfuse_jax.parallel.mesh import make_mesh
from emfuse_jax.parallel.rows import shard_rows
from emfuse_jax.parallel.seeds import pmap_seeds, shard_seeds
from parallel._work import energy, energy_learner, rows, train


def new_seeds():
    """The runs' keys, made anew: a key is consumed once."""
    return jax.random.split(jax.random.key(0), 4)


@pytest.fixture(scope="module")
def data():
    return jnp.asarray(rows())


@pytest.fixture(scope="module")
def looped(data):
    run = jax.jit(lambda key, d: train(energy_learner(), key, d))
    runs = [run(key, data) for key in new_seeds()]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)


def assert_equal(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def run_alone(key, data):
    return train(energy_learner(), key, data)


@pytest.mark.parametrize("devices", [1, 3, 4, 8])
def test_split_seeds_equal_a_loop_of_seeds(devices, data, looped):
    runs = jax.jit(shard_seeds(run_alone, make_mesh({"seed": devices})))
    assert_equal(runs(new_seeds(), data), looped)


def test_seeds_do_not_talk_to_each_other(data):
    runs = jax.jit(shard_seeds(run_alone, make_mesh({"seed": 4})))
    text = runs.lower(new_seeds(), data).compile().as_text()
    for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert name not in text


@pytest.mark.parametrize("shape", [(2, 4)], ids=str)
def test_seeds_times_data_is_one_mesh(shape, data, looped):
    """Each seed's batch is split once more, and its queries too."""
    mesh = make_mesh({"seed": shape[0], "data": shape[1]})
    learner = data_parallel(energy_learner(), mesh)
    queries = shard_rows(energy, mesh, in_axes=(None, 0))

    def run(key, data):
        state, metrics = train(learner, key, data)
        return state, metrics, queries(state.params, data)

    state, metrics, energies = jax.jit(shard_seeds(run, mesh))(new_seeds(), data)
    assert_equal((state, metrics), looped)
    plain = jax.vmap(energy, in_axes=(0, None))(looped[0].params, data)
    assert_equal(energies, plain)


def test_pmap_seeds_is_the_same(data, looped):
    state, metrics = pmap_seeds(run_alone)(new_seeds().reshape(2, 2), data)
    assert metrics["loss"].shape == (2, 2, 3)
    joined = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), (state, metrics))
    assert_equal(joined, looped)


def test_errors_name_the_fix(data):
    mesh = make_mesh({"seed": 4, "data": 2})
    with pytest.raises(ValueError, match=r"call jax\.jit"):
        shard_seeds(run_alone, mesh)(new_seeds(), data)
    with pytest.raises(ValueError, match="one key per seed"):
        shard_seeds(run_alone, mesh)(jax.random.key(0), data)
    with pytest.raises(ValueError, match="no axis 'seed'"):
        shard_seeds(run_alone, make_mesh({"data": 8}))
    with pytest.raises(ValueError, match=r"expected \[device, seed\]"):
        pmap_seeds(run_alone)(new_seeds(), data)
    with pytest.raises(ValueError, match="16 devices, there are 8"):
        pmap_seeds(run_alone)(jax.random.split(jax.random.key(1), (16, 1)), data)
