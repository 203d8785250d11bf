"""Model soups: what the mean keeps, what it refuses, and the greedy recipe."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.merging import check_same_architecture, greedy_soup, model_soup

Pair = collections.namedtuple("Pair", ["scales", "layers"])


def make_tree(seed, width=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    layers = [
        {"w": jnp.asarray(rng.standard_normal((2, width)), dtype)} for _ in range(2)
    ]
    return Pair(jnp.asarray(rng.standard_normal(2), dtype), layers)


def assert_trees_equal(first, second, **tolerance):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 0}))


def test_soup_of_one_is_itself():
    tree = make_tree(0)
    assert_trees_equal(model_soup([tree]), tree)
    assert_trees_equal(model_soup([tree], [1.0]), tree)


def test_soup_is_the_weighted_mean():
    trees = [make_tree(seed) for seed in range(3)]
    weights = [0.5, 0.3, 0.2]
    soup = model_soup(trees, weights)
    expected = jax.tree.map(
        lambda *leaves: sum(
            w * np.asarray(x, np.float64) for w, x in zip(weights, leaves, strict=True)
        ),
        *trees,
    )
    for a, b in zip(jax.tree.leaves(soup), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    # Weights do weigh, and an expert of weight 0 has no say.
    assert not np.allclose(soup.scales, model_soup(trees).scales)
    assert_trees_equal(model_soup(trees, [0.0, 1.0, 0.0]), trees[1])


def test_a_soup_is_compiled_with_traced_weights():
    trees = [make_tree(seed) for seed in range(2)]
    weights = jnp.array([0.25, 0.75])
    assert_trees_equal(jax.jit(model_soup)(trees, weights), model_soup(trees, weights))


def test_half_precision_is_added_up_in_float32():
    # In bfloat16 256 + 1 is 256: added up there, the ones would not count.
    trees = [{"w": jnp.asarray([x], jnp.bfloat16)} for x in (256.0, 1.0, 1.0, 2.0)]
    soup = model_soup(trees)["w"]
    assert soup.dtype == jnp.bfloat16
    assert float(soup[0]) == 65.0
    narrow = sum((tree["w"] for tree in trees), jnp.zeros(1, jnp.bfloat16)) / 4
    assert float(narrow[0]) != 65.0


def test_other_architectures_are_refused_by_the_leafs_name():
    with pytest.raises(
        ValueError, match=r"leaf layers\.0\.w is \[2, 4\] in model 1, \[2, 3\]"
    ):
        model_soup([make_tree(0), make_tree(1, width=4)])
    first, second = make_tree(0), make_tree(1)
    second.layers[1]["bias"] = jnp.zeros(3)
    with pytest.raises(ValueError, match=r"layers\.1\.bias is \[3\] in b, absent in a"):
        check_same_architecture([first, second], ["a", "b"])
    with pytest.raises(ValueError, match=r"layers\.1\.bias is absent in model 1"):
        model_soup([second, first])
    with pytest.raises(ValueError, match="leaf step is int32 in model 0"):
        model_soup([{"step": jnp.zeros((), jnp.int32)}])
    with pytest.raises(ValueError, match="no models"):
        model_soup([])


@pytest.mark.parametrize(
    ("weights", "words"),
    [([0.5], "each of the 2"), ([0.5, 0.6], "sum to 1.1"), ([1.5, -0.5], "negative")],
)
def test_weights_that_are_no_weights(weights, words):
    with pytest.raises(ValueError, match=words):
        model_soup([make_tree(0), make_tree(1)], weights)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_soup_is_never_worse_than_its_best_member(seed):
    """A rugged score, of which the mean of good points need not be good."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0.0, 6.0, 4)
    trees = [{"w": jnp.asarray(rng.standard_normal(4), jnp.float32)} for _ in range(5)]

    def score(tree):
        return float(np.sum(np.sin(5.0 * np.asarray(tree["w"]) + phase)))

    found = greedy_soup(trees, score)
    assert found.score >= max(found.scores)
    assert found.score == pytest.approx(score(found.params))
    assert found.scores == pytest.approx([score(tree) for tree in trees])
    expected = model_soup([trees[i] for i in found.members])
    assert_trees_equal(found.params, expected)
    # The uniform soup of all, which asks no score, is worse than the best somewhere.
    assert seed or score(model_soup(trees)) < max(found.scores)


def test_greedy_soup_tries_the_best_first_and_equals_in_their_order():
    tried = []

    def score(tree):
        tried.append(float(tree["w"]))
        return {0.0: 1.0, 10.0: 3.0, 20.0: 2.0, 30.0: 2.0}.get(tried[-1], 3.0)

    trees = [{"w": jnp.asarray(w)} for w in (0.0, 10.0, 20.0, 30.0)]
    found = greedy_soup(trees, score)
    assert tried[:4] == [0.0, 10.0, 20.0, 30.0]
    # 20 before 30 although their scores are equal; a score that stays lets a model in,
    # one that falls keeps it out.
    assert tried[4:] == [15.0, 20.0, 10.0]
    assert found.members == (1, 2, 0)
    assert len(tried) == 2 * 4 - 1


def test_greedy_soup_without_scores():
    trees = [{"w": jnp.asarray(w)} for w in (0.0, 4.0)]
    # What has diverged stays out, wherever it stands.
    broken = greedy_soup(trees, lambda t: np.nan if float(t["w"]) != 4.0 else 1.0)
    assert broken.members == (1,)
    with pytest.raises(ValueError, match="no model has a score"):
        greedy_soup(trees, lambda tree: np.nan)
