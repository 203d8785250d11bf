"""Grams: padding, streaming, memory, and flax layers behind transformations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.merging import (
    Gram,
    Stage,
    collect_grams,
    flax_grams,
    gram,
    gram_memory,
    regmean,
    regmean_streamed,
    tree_bytes,
)
from emfuse_jax.nets.critic import ensemble
from emfuse_jax.nets.encoder import slice_encoder
from emfuse_jax.nets.mlp import mlp


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_gram_is(found, rows):
    rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
    np.testing.assert_allclose(found.total, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert float(found.num_rows) == len(rows)


def test_padding_counts_nothing_whatever_it_holds():
    inputs = normal(0, 3, 4, 2)
    mask = jnp.array([[True] * 4, [True, False, False, True], [False] * 4])
    padded = jnp.where(mask[..., None], inputs, jnp.nan)
    assert_gram_is(gram(padded, mask), np.asarray(inputs)[np.asarray(mask)])
    assert_gram_is(gram(inputs), inputs)
    assert not np.allclose(gram(inputs).total, gram(padded, mask).total)


def test_half_precision_is_added_up_in_float32():
    inputs = jnp.ones((1000, 1), jnp.bfloat16)
    assert gram(inputs).total.dtype == jnp.float32
    assert float(gram(inputs).total[0, 0]) == 1000.0  # bfloat16 has no 257


def layer(params, carry):
    """Two kernels on the same inputs, and one on the product."""
    x, mask = carry
    hidden = (x @ params["a"]) * jnp.tanh(x @ params["b"])
    return (hidden @ params["c"], mask), {"in": (x, mask), "hidden": (hidden, mask)}


READS = {"a": "in", "b": "in", "c": "hidden"}


def make_layers(seed):
    return {
        "layers": [
            {
                "a": normal(seed, 3, 5),
                "b": normal(seed + 1, 3, 5),
                "c": normal(seed + 2, 5, 3),
            }
            for seed in (10 * seed, 10 * seed + 5)
        ]
    }


def make_carries(seed):
    lengths = jnp.array([[7, 4], [2, 7]])
    masks = jnp.arange(7)[None, None] < lengths[..., None]
    return [(normal(seed + i, 2, 7, 3), masks[i]) for i in range(2)]


def whole(params, carry):
    """Both layers as a single stage."""
    inputs = {}
    for index, own in enumerate(params["layers"]):
        carry, found = layer(own, carry)
        inputs |= {f"{index}.{name}": value for name, value in found.items()}
    return carry, inputs


STAGES = [Stage(("layers", index), layer, READS) for index in range(2)]
WHOLE = [
    Stage(
        (),
        whole,
        {f"layers.{i}.{k}": f"{i}.{n}" for i in range(2) for k, n in READS.items()},
    )
]


def test_stage_by_stage_is_all_at_once():
    params, carries = make_layers(1), make_carries(2)
    parts = list(collect_grams(STAGES, params, carries))
    assert [sorted(part) for part in parts] == [
        [f"layers.{i}.{name}" for name in "abc"] for i in range(2)
    ]
    (once,) = collect_grams(WHOLE, params, carries)
    streamed = {**parts[0], **parts[1]}
    assert set(streamed) == set(once)
    for name in once:
        np.testing.assert_allclose(streamed[name].total, once[name].total, rtol=1e-5)
        assert float(streamed[name].num_rows) == 7 + 4 + 2 + 7
    # Kernels that read the same share their Gram, and batches add up.
    assert streamed["layers.0.a"] is streamed["layers.0.b"]
    rows = [np.asarray(x)[np.asarray(mask)] for x, mask in carries]
    assert_gram_is(streamed["layers.0.a"], np.concatenate(rows))


def test_a_streamed_merge_is_the_merge():
    params = [make_layers(1), make_layers(2)]
    carries = [make_carries(3), make_carries(4)]
    grams = [
        next(iter(collect_grams(WHOLE, p, c)))
        for p, c in zip(params, carries, strict=True)
    ]
    done = []
    options = {"weights": [0.7, 0.3], "shrinkage": 0.3, "ridge": 0.01}
    streamed = regmean_streamed(
        params, STAGES, carries, on_stage=done.append, **options
    )
    at_once = regmean(params, grams, **options)
    assert done == [1, 2]
    for a, b in zip(jax.tree.leaves(streamed), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_memory_stated_is_the_memory_held():
    params, carries = make_layers(1), make_carries(2)
    stated = gram_memory(STAGES, params, carries)
    held = []
    for grams in collect_grams(STAGES, params, carries):
        arrays = {id(g.total): g for g in grams.values()}  # shared ones count once
        held.append(tree_bytes(list(arrays.values())))
    assert stated.largest == max(held) == 4 * (3 * 3 + 1 + 5 * 5 + 1)
    assert stated.total == sum(held)
    assert stated.carries == tree_bytes(carries)
    assert stated.widest == 5
    assert stated.peak(3) == 3 * (stated.largest + stated.carries) + 24 * 25
    assert gram_memory(WHOLE, params, carries).largest == stated.total


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no batches"):
        list(collect_grams(STAGES, make_layers(1), []))


def test_flax_layers_of_an_mlp():
    network = mlp(2, (6, 5))
    x = normal(0, 7, 3)
    params = network.init(jax.random.key(0), x)
    found = jax.jit(lambda p, x: flax_grams(network.apply, p, x))(params, x)
    assert sorted(found) == [f"params.{n}.kernel" for n in ("fc0", "fc1", "last_fc")]
    weights = params["params"]
    hidden = jax.nn.relu(x @ weights["fc0"]["kernel"] + weights["fc0"]["bias"][None])
    last = jax.nn.relu(hidden @ weights["fc1"]["kernel"] + weights["fc1"]["bias"][None])
    for name, rows in (("fc0", x), ("fc1", hidden), ("last_fc", last)):
        assert_gram_is(found[f"params.{name}.kernel"], rows)


def test_flax_layers_are_counted_through_vmap_scan_and_checkpoint():
    module = nn.Dense(3)
    x = normal(1, 4, 5, 3)
    params = {"net": module.init(jax.random.key(0), x)}

    def apply(params, x):
        return module.apply(params["net"], x)

    def mapped(params, x):
        return jax.vmap(jax.checkpoint(apply), in_axes=(None, 0))(params, x)

    def scanned(params, x):
        return jax.lax.scan(lambda carry, row: (carry, apply(params, row)), 0, x)[1]

    for fn in (apply, mapped, scanned):
        (name, found), *more = flax_grams(fn, params, x).items()
        assert name == "net.params.kernel"
        assert not more
        assert_gram_is(found, x)


def test_stacked_flax_layers_have_grams_of_their_own():
    network = ensemble(mlp(1, (4,)), 3)
    x = normal(2, 6, 2)
    params = jax.jit(network.init)(jax.random.key(0), x)
    found = jax.jit(lambda *args: flax_grams(network.apply, *args))(params, x)
    assert found["params.fc0.kernel"].total.shape == (3, 2, 2)
    assert found["params.last_fc.kernel"].total.shape == (3, 4, 4)
    assert found["params.last_fc.kernel"].num_rows.tolist() == [6.0] * 3
    for index in range(3):
        own = jax.tree.map(lambda leaf, i=index: leaf[i], params["params"]["fc0"])
        hidden = jax.nn.relu(x @ own["kernel"] + own["bias"][None])
        each = Gram(*(leaf[index] for leaf in found["params.last_fc.kernel"]))
        assert_gram_is(each, hidden)


def test_attention_has_a_gram_of_its_flattened_heads():
    network = slice_encoder(4, 6, 2)
    inputs = (normal(0, 5, 3), normal(1, 5, 2, 2), jnp.ones((5, 2), bool))
    params = jax.jit(network.init)(jax.random.key(0), *inputs)
    found = jax.jit(lambda *args: flax_grams(network.apply, *args))(params, *inputs)
    widths = {
        name.removeprefix("params.").removesuffix(".kernel"): (
            found[name].total.shape[-1],
            int(found[name].num_rows),
        )
        for name in found
    }
    assert widths == {
        "action.token": (2, 10),
        "action.attention.query": (6, 5),
        "action.attention.key": (6, 10),
        "action.attention.value": (6, 10),
        "action.attention.out": (6, 5),
        "state_0": (5, 5),
        "state_1": (4, 5),
    }
    out = params["params"]["action"]["attention"]["out"]
    assert out["kernel"].shape == (2, 3, 6)
    merged = regmean([params, params], [found] * 2, ridge=1e-3)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_contracted_axes_need_not_be_the_last_ones():
    module = nn.DenseGeneral(4, axis=(1, -1))
    x = normal(3, 5, 2, 6, 3)
    params = module.init(jax.random.key(0), x)
    found = flax_grams(module.apply, params, x)["params.kernel"]
    assert_gram_is(found, np.moveaxis(np.asarray(x), 1, 2).reshape(5, 6, 6))
