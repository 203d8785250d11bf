import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import History
from emfuse_jax.parallel.mesh import make_mesh
from emfuse_jax.parallel.rows import ROW_KEY, pmap_rows, shard_rows
from parallel._work import PARAMS, chain, dispersion, slices

POSITION = jax.random.normal(jax.random.key(1), (24, 3))
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")


def new_key():
    """The run's key, made anew: a key is consumed once."""
    return jax.random.key(5)


def row_by_row(key, position):
    """What shard_rows promises: row i alone, with the key fold_in(key, i)."""
    run = jax.jit(chain)
    rows = [
        run(PARAMS, jax.random.fold_in(key, i), position[i : i + 1])
        for i in range(position.shape[0])
    ]
    return jnp.concatenate(rows)


@pytest.fixture(scope="module")
def expected():
    return row_by_row(new_key(), POSITION)


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_numbers_do_not_depend_on_the_device_count(devices, expected):
    run = jax.jit(shard_rows(chain, make_mesh({"data": devices})))
    result = run(PARAMS, new_key(), POSITION)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    # Devices that all drew with the one key would repeat each other's noise.
    again = run(PARAMS, new_key(), jnp.zeros_like(POSITION))
    assert len(np.unique(np.asarray(again)[:, 0])) == 24


def test_numbers_do_not_depend_on_blocks_or_on_what_follows(expected):
    mesh = make_mesh({"data": 4})
    blocked = jax.jit(shard_rows(chain, mesh, block_size=4))
    np.testing.assert_allclose(
        blocked(PARAMS, new_key(), POSITION), expected, rtol=1e-5, atol=1e-6
    )
    # 21 rows on 4 devices: padded inside, and the first 21 of 24 outside.
    few = jax.jit(shard_rows(chain, mesh))(PARAMS, new_key(), POSITION[:21])
    np.testing.assert_allclose(few, expected[:21], rtol=1e-5, atol=1e-6)


def test_nothing_is_exchanged():
    run = jax.jit(shard_rows(chain, make_mesh({"data": 8})))
    text = run.lower(PARAMS, new_key(), POSITION).compile().as_text()
    for name in COLLECTIVES:
        assert name not in text


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_drawn_numbers_are_the_same_bits(devices):
    """No arithmetic follows, so nothing is rounded: equal, not close."""

    def draw(key, position):
        return jax.random.normal(key, position.shape)

    run = shard_rows(draw, make_mesh({"data": devices}), in_axes=(ROW_KEY, 0))
    expected = [
        jax.random.normal(jax.random.fold_in(new_key(), i), (1, 3)) for i in range(24)
    ]
    np.testing.assert_array_equal(
        jax.jit(run)(new_key(), POSITION), jnp.concatenate(expected)
    )


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_slice_uncertainties_are_equal(devices):
    queries = shard_rows(dispersion, make_mesh({"data": devices}), in_axes=(None, 1))
    # 30 rows: not a multiple of four.
    np.testing.assert_allclose(
        jax.jit(queries)(PARAMS, slices()[:, :30]),
        dispersion(PARAMS, slices()[:, :30]),
        rtol=1e-5,
    )


@pytest.fixture(scope="module")
def history():
    key_observation, key_action = jax.random.split(jax.random.key(2))
    return History(
        observation=jax.random.normal(key_observation, (5, 16, 3)),
        action=jax.random.normal(key_action, (5, 16, 2)),
        valid=jnp.ones((5, 16), bool),
    )


def test_trees_of_axes_for_arguments_and_results(history):
    def forecast(key, batch):
        last = batch["history"].observation[:1] + batch["offset"][None]
        noisy = last + jax.random.normal(key, last.shape)
        return {"path": jnp.concatenate([last, noisy]), "first": last[0]}

    axes = (ROW_KEY, {"history": 1, "offset": 0})
    run = shard_rows(
        forecast,
        make_mesh({"other": 2, "data": 4}),
        in_axes=axes,
        out_axes={"path": 1, "first": 0},
    )
    batch = {"history": history, "offset": jnp.ones((16, 3))}
    result = jax.jit(run)(new_key(), batch)
    assert result["path"].shape == (2, 16, 3)
    np.testing.assert_array_equal(result["first"], history.observation[0] + 1.0)
    # Through pmap, with [device, …] leaves, the numbers are the same.
    by_device = {
        "history": jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(5, 4, 4, *x.shape[2:]), 1, 0), history
        ),
        "offset": batch["offset"].reshape(4, 4, 3),
    }
    mapped = pmap_rows(forecast, in_axes=axes, out_axes={"path": 1, "first": 0})
    pieces = mapped(new_key(), by_device)
    assert pieces["path"].shape == (4, 2, 4, 3)
    np.testing.assert_allclose(
        jnp.moveaxis(pieces["path"], 0, 1).reshape(2, 16, 3), result["path"], rtol=1e-6
    )


def test_pmap_rows_draws_the_same_numbers(expected):
    run = pmap_rows(chain, block_size=2)
    pieces = run(PARAMS, new_key(), POSITION.reshape(8, 3, 3))
    assert len(pieces.sharding.device_set) == 8
    np.testing.assert_allclose(pieces.reshape(24, 3), expected, rtol=1e-5, atol=1e-6)


def test_gradients_with_respect_to_shared_parameters():
    """shard_map with check_vma=False: a sum inside it would be N times too large."""

    def objective(run, params):
        return jnp.mean(jnp.square(run(params, new_key(), POSITION)))

    gradients = [
        jax.jit(jax.grad(lambda p, r=run: objective(r, p)))(PARAMS)["w"]
        for run in (
            shard_rows(chain, make_mesh({"data": 1})),
            shard_rows(chain, make_mesh({"data": 8})),
        )
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5)


def test_errors_say_what_does_not_fit():
    mesh = make_mesh({"data": 8})
    with pytest.raises(ValueError, match=r"have \[16, 24\] rows"):
        shard_rows(lambda p, k, a, b: a, mesh)(
            PARAMS, new_key(), POSITION, POSITION[:16]
        )
    with pytest.raises(ValueError, match="no row axis 1"):
        shard_rows(lambda x: x, mesh, in_axes=(1,))(jnp.zeros(8))
    with pytest.raises(ValueError, match="3 entries for 2 arguments"):
        shard_rows(dispersion, mesh, in_axes=(None, 1, 0))(PARAMS, slices())
    with pytest.raises(ValueError, match="several keys"):
        shard_rows(chain, mesh, in_axes=(ROW_KEY, ROW_KEY, 0))(
            new_key(), new_key(), POSITION
        )
    with pytest.raises(ValueError, match=r"leaf of shape \(\).*per row"):
        shard_rows(lambda x: jnp.mean(x), mesh, in_axes=(0,))(POSITION)
    with pytest.raises(ValueError, match="no rows"):
        shard_rows(lambda x: x, mesh, in_axes=(None,))(POSITION)
    with pytest.raises(ValueError, match="no axis 'seed'"):
        shard_rows(chain, mesh, axis="seed")
    with pytest.raises(ValueError, match="12 devices, there are 8"):
        pmap_rows(chain)(PARAMS, new_key(), POSITION.reshape(12, 2, 3))
