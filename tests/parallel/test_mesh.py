import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from emfuse_jax.parallel.mesh import broadcast_axes, make_mesh, replicate, split


def test_sizes_and_types_of_axes():
    mesh = make_mesh({"seed": 2, "data": -1})
    assert dict(mesh.shape) == {"seed": 2, "data": 4}
    # jax.make_mesh alone would make Explicit axes, which change the types of arrays.
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    few = make_mesh({"data": 3})
    assert list(few.devices.flat) == jax.devices()[:3]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 9}, ["9 devices", "there are 8", "jax_num_cpu_devices"]),
        ({"data": 3, "seed": -1}, ["3 does not divide the 8", "'seed'"]),
        ({"data": -1, "seed": -1}, ["at most one -1"]),
        ({"data": 0}, ["positive"]),
        ({}, ["needs an axis"]),
    ],
)
def test_errors_name_the_numbers_and_the_fix(sizes, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        make_mesh(sizes)


def test_copies_survive_the_donation_of_the_other():
    mesh = make_mesh({"data": -1})
    original = {"w": jnp.arange(8.0)}
    for placed in (replicate(original, mesh), split(original, mesh)):
        jax.jit(lambda tree: jax.tree.map(jnp.sin, tree), donate_argnums=0)(placed)
        assert placed["w"].is_deleted()
        np.testing.assert_array_equal(original["w"], np.arange(8.0))


def test_where_the_parts_of_a_tree_lie():
    mesh = make_mesh({"data": -1})
    rows = split(jnp.zeros((2, 16)), mesh, row_axis=1)
    assert rows.sharding.spec == PartitionSpec(None, "data")
    assert rows.addressable_shards[0].data.shape == (2, 2)
    assert replicate(jnp.zeros(4), mesh).sharding.is_fully_replicated
    with pytest.raises(ValueError, match="nearest sizes: 8 and 16"):
        split({"x": jnp.zeros(12)}, mesh)
    with pytest.raises(ValueError, match=r"no axis 'seed', only \['data'\]"):
        split(jnp.zeros(8), mesh, axis="seed")


def test_row_axes_are_a_prefix_as_in_vmap():
    tree = {"a": (jnp.zeros(2), jnp.zeros(3)), "b": jnp.zeros(4)}
    assert broadcast_axes({"a": 1, "b": None}, tree) == [1, 1, None]
    assert broadcast_axes(0, tree) == [0, 0, 0]
    with pytest.raises(ValueError, match="do not fit"):
        broadcast_axes({"a": 1}, tree)
    with pytest.raises(ValueError, match="from 0"):
        broadcast_axes(-1, tree)
