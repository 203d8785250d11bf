"""Laws of the decoder that hold whatever its weights: no torch is needed here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _lm_models import TINY, families, largest, random_params, random_tokens
from emfuse_jax import tree
from emfuse_jax.llm import (
    EXPERT_AXES,
    LINEAR_INPUTS,
    LmConfig,
    apply_layer,
    embed_tokens,
    init_params,
    language_model,
    logits,
)

CONFIGS = {
    name: dataclasses.replace(TINY, **parts) for name, parts in families().items()
}
TOKENS = random_tokens(1, (2, 12))
ALL = jnp.ones(TOKENS.shape, bool)


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@functools.cache
def compiled(config, name):
    if name == "logits":
        return jax.jit(functools.partial(logits, config))
    static = "last_only" if name == "prefill" else None
    return jax.jit(getattr(language_model(config), name), static_argnames=static)


@functools.cache
def full(config):
    return compiled(config, "logits")(random_params(config), TOKENS, ALL)


def test_cached_is_uncached(config):
    """Prefill, extend and step by step say what one pass over everything says."""
    params, model = random_params(config), language_model(config)
    prefill, extend, step = (compiled(config, x) for x in ("prefill", "extend", "step"))
    found, cache = prefill(params, TOKENS[:, :5], ALL[:, :5], model.init_cache(2, 16))
    parts = [found]
    found, cache = extend(params, TOKENS[:, 5:9], ALL[:, 5:9], cache)
    parts.append(found)
    for column in range(9, 12):
        found, cache = step(params, TOKENS[:, column], cache)
        parts.append(found[:, None])
    assert largest(jnp.concatenate(parts, 1) - full(config)) < 1e-5
    assert largest(full(config)) > 1.0
    assert cache.num_tokens.tolist() == [12, 12]
    assert int(cache.column) == 12
    # A step without the cache's past is another thing.
    fresh, _ = step(params, TOKENS[:, 11], model.init_cache(2, 16))
    assert largest(fresh - full(config)[:, -1]) > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(config, side):
    """Row 0 has 12 tokens, row 1 has 7; what fills row 1 up does not matter."""
    params, model = random_params(config), language_model(config)
    alone = TOKENS[1:, :7]
    longer = jnp.concatenate([alone, jnp.array([[3]])], 1)
    *reference, following = compiled(config, "logits")(params, longer, ALL[1:, :8])[0]
    reference = jnp.stack(reference)
    place = slice(5, 12) if side == "left" else slice(0, 7)
    valid = ALL.at[1].set(False).at[1, place].set(True)
    every = []
    for filler in (0, 66):
        tokens = TOKENS.at[1].set(filler).at[1, place].set(alone[0])
        found = compiled(config, "logits")(params, tokens, valid)
        assert largest(found[1, place] - reference) < 1e-5
        assert largest(found[0] - full(config)[0]) < 1e-5
        cache = model.init_cache(2, 16)
        last, cache = compiled(config, "prefill")(
            params, tokens, valid, cache, last_only=True
        )
        assert largest(last[1, 0] - reference[-1]) < 1e-5
        after, _ = compiled(config, "step")(params, jnp.array([3, 3]), cache)
        every.append((found[1, place], last, after))
    for first, second in zip(*every, strict=True):
        np.testing.assert_array_equal(first, second)
    assert largest(every[0][2][1] - following) < 1e-5
    # Had the filler been read, it would have shown.
    seen = compiled(config, "logits")(params, tokens, ALL)
    assert side == "right" or largest(seen[1, place] - reference) > 0.1


def test_padding_alone_gives_no_nan():
    config = CONFIGS["qwen3"]
    params = random_params(config)
    valid = ALL.at[1].set(False)
    found = compiled(config, "logits")(params, TOKENS, valid)
    assert jnp.isfinite(found).all()
    grad = jax.jit(jax.grad(lambda p: logits(config, p, TOKENS, valid).sum()))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


def test_the_future_changes_no_bit_of_the_past(config):
    params = random_params(config)
    for column in (3, 11):
        other = TOKENS.at[:, column].set((TOKENS[:, column] + 1) % TINY.vocab_size)
        found = compiled(config, "logits")(params, other, ALL)
        np.testing.assert_array_equal(found[:, :column], full(config)[:, :column])
        assert largest(found[:, column] - full(config)[:, column]) > 0.1


def test_layer_by_layer_is_the_model(config):
    params = random_params(config)
    hidden = embed_tokens(params, TOKENS)
    layerwise = jax.jit(functools.partial(apply_layer, config))
    for layer in params["layers"]:
        before = hidden
        hidden, inputs = layerwise(layer, hidden, ALL)
        linears = {name for name in layer if layer[name].ndim == 2}
        assert linears == set(LINEAR_INPUTS)
        for name in linears:
            assert inputs[LINEAR_INPUTS[name]].shape[-1] == layer[name].shape[0]
        # The inputs are those that the kernels really multiply.
        outs = [inputs[LINEAR_INPUTS[name]] @ layer[name] for name in ("o", "down")]
        outs[0] = outs[0] + layer.get("o_bias", jnp.zeros(32))[None, None]
        assert largest(before + outs[0] + outs[1] - hidden) < 1e-5
    square = jnp.mean(jnp.square(hidden), -1, keepdims=True)
    normed = (
        hidden / jnp.sqrt(square + config.norm_epsilon) * params["norm"][None, None]
    )
    kernel = params["embed"].T if config.tied else params["head"]
    assert largest(normed @ kernel - full(config)) < 1e-5


def test_mapped_experts_are_each_alone(config):
    """One step over stacked parameters and caches; the bookkeeping is shared."""
    model, every = language_model(config), [random_params(config, i) for i in range(3)]
    prefill, step = compiled(config, "prefill"), compiled(config, "step")
    empty = model.init_cache(2, 16)
    caches = [prefill(params, TOKENS[:, :5], ALL[:, :5], empty)[1] for params in every]
    alone = [
        step(params, TOKENS[:, 5], cache)[0]
        for params, cache in zip(every, caches, strict=True)
    ]
    both = tree.stack([(cache.keys, cache.values) for cache in caches])
    stacked = caches[0]._replace(keys=both[0], values=both[1])
    mapped = jax.vmap(
        model.step, in_axes=(0, None, EXPERT_AXES), out_axes=(0, EXPERT_AXES)
    )
    donated = jax.jit(mapped, donate_argnums=2)
    params = tree.stack(every)
    program = donated.lower(params, TOKENS[:, 5], stacked).compile()
    found, after = program(params, TOKENS[:, 5], stacked)
    assert largest(found - jnp.stack(alone)) < 1e-5
    assert largest(found[0] - found[1]) > 0.1
    assert after.valid.shape == (2, 16)
    assert after.keys[0].shape[0] == 3
    # The caches are written in place. (Which copies and layouts XLA chooses beyond that
    # depends on its flags and threads.)
    text = program.as_text()
    assert " dynamic-update-slice(" in text
    assert " scatter(" not in text


def test_equal_configs_are_one_model():
    again = LmConfig(
        **{f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}
    )
    assert language_model(again) is language_model(TINY)
    other = dataclasses.replace(TINY, context_length=64)
    assert language_model(other) is not language_model(TINY)
    assert language_model(other).context_length == 64
    assert language_model(TINY).vocab_size == TINY.vocab_size


def test_bfloat16_stays_bfloat16():
    config = dataclasses.replace(CONFIGS["qwen2"], dtype="bfloat16")
    params, model = random_params(config), language_model(config)
    cache = model.init_cache(2, 16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    shapes, cache = jax.eval_shape(model.prefill, params, TOKENS, ALL, cache)
    assert shapes.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in (*cache.keys, *cache.values)} == {"bfloat16"}
    hidden, inputs = jax.eval_shape(
        functools.partial(apply_layer, config),
        params["layers"][0],
        jax.ShapeDtypeStruct((2, 12, 32), jnp.bfloat16),
        ALL,
    )
    assert {x.dtype.name for x in (hidden, *inputs.values())} == {"bfloat16"}


def test_initial_scale():
    """Laws start near uniform; what writes to the stream is smaller the deeper it is."""
    config = CONFIGS["llama"]
    params = init_params(jax.random.key(0), config)
    found = compiled(config, "logits")(params, TOKENS, ALL)
    assert 0.01 < float(jnp.std(found)) < 0.3
    for name, depth in {"gate": 1, "o": 2 * config.num_layers}.items():
        kernel = params["layers"][0][name]
        spread = float(jnp.std(kernel)) * (depth * kernel.shape[0]) ** 0.5
        assert abs(spread - 1) < 4 / (2 * kernel.size) ** 0.5
    first, second = (layer["q"] for layer in params["layers"])
    assert largest(first - second) > 0.1


def test_bad_shapes_are_refused():
    params, model = random_params(TINY), language_model(TINY)
    with pytest.raises(ValueError, match="13 columns for a cache of length 12"):
        model.prefill(params, *_columns(13), model.init_cache(1, 12))
    with pytest.raises(ValueError, match="13 columns for a cache of length 12"):
        model.extend(params, *_columns(13), model.init_cache(1, 12))
    with pytest.raises(ValueError, match="at least one column"):
        logits(TINY, params, *_columns(0))
    with pytest.raises(ValueError, match="sizes of at least 1"):
        model.init_cache(1, 0)


def _columns(count):
    return jnp.zeros((1, count), jnp.int32), jnp.ones((1, count), bool)
