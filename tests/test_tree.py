import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import tree

TREES = [{"w": jnp.full((2, 3), float(i)), "n": jnp.array(i)} for i in range(3)]


def test_unstack_inverts_stack():
    stacked = tree.stack(TREES)
    assert stacked["w"].shape == (3, 2, 3)
    assert stacked["n"].shape == (3,)
    for original, back in zip(TREES, tree.unstack(stacked), strict=True):
        jax.tree.map(np.testing.assert_array_equal, original, back)
        assert tree.same_structure(original, back)


def test_stack_refuses_nothing_and_trees_that_differ():
    with pytest.raises(ValueError, match="at least one"):
        tree.stack([])
    with pytest.raises(ValueError, match="tree 1 has shapes"):
        tree.stack([{"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}])
    with pytest.raises(ValueError, match="tree 2 has shapes"):
        tree.stack([{"w": jnp.zeros(2)}] * 2 + [{"v": jnp.zeros(2)}])


def test_weighted_mean_sums_the_first_axis():
    mean = tree.weighted_mean(tree.stack(TREES), jnp.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(mean["w"], np.full((2, 3), 0.75))
    one_hot = tree.weighted_mean(tree.stack(TREES), jnp.array([0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(one_hot["w"], TREES[2]["w"])


def test_select_broadcasts_over_trailing_axes():
    rows = {"x": jnp.ones((3, 2)), "y": jnp.ones((3, 2, 4))}
    nothing = jax.tree.map(jnp.zeros_like, rows)
    chosen = tree.select(jnp.array([True, False, True]), rows, nothing)
    np.testing.assert_array_equal(chosen["x"].sum(1), [2, 0, 2])
    np.testing.assert_array_equal(chosen["y"].sum((1, 2)), [8, 0, 8])
    both = tree.select(jnp.array(False), rows, nothing)
    jax.tree.map(np.testing.assert_array_equal, both, nothing)


def test_same_structure_sees_shapes_dtypes_and_names():
    base = {"a": jnp.zeros(2), "b": (jnp.zeros((), jnp.int32),)}
    assert tree.same_structure(base, jax.tree.map(lambda x: x + 1, base))
    assert not tree.same_structure(base, {**base, "a": jnp.zeros(3)})
    assert not tree.same_structure(base, {**base, "a": jnp.zeros(2, jnp.int32)})
    assert not tree.same_structure(base, {**base, "b": [jnp.zeros((), jnp.int32)]})
    assert not tree.same_structure(base, {**base, "c": None, "d": jnp.zeros(1)})
