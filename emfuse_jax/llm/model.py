"""Llama-3, Qwen2 and Qwen3 as pure functions over a plain tree of arrays.

One decoder serves the families: pre-norm residual blocks of grouped-query attention with
rotary positions and a SiLU-gated layer (Grattafiori et al. 2024, arXiv 2407.21783; Yang et
al. 2024, arXiv 2412.15115; 2025, arXiv 2505.09388). Kernels are stored ``[in, out]``:

    {"embed": [vocab, hidden], "norm": [hidden], "head": [hidden, vocab] unless tied,
     "layers": [{"attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down",
                 "q_bias" … where the config has biases, "q_norm" and "k_norm" in Qwen3}]}

Layers are unrolled: a scan over stacked layers, mapped over experts, would copy the
weights in every step. Products in float32 are as exact as the backend's default, which on
some GPUs is TF32; ``jax.default_matmul_precision("highest")`` around the call makes them
float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import LanguageModel, Params
from emfuse_jax.llm.cache import (
    KvCache,
    check_room,
    init_cache,
    mark_columns,
    write_columns,
)
from emfuse_jax.llm.config import LmConfig
from emfuse_jax.llm.rope import Rotation, rotate, rotation

LINEAR_INPUTS = {
    "q": "attn_in",
    "k": "attn_in",
    "v": "attn_in",
    "o": "o_in",
    "gate": "mlp_in",
    "up": "mlp_in",
    "down": "down_in",
}
"""Which of `apply_layer`'s inputs each kernel of a layer multiplies."""

_Pair = tuple[jax.Array, jax.Array]
_Inputs = dict[str, jax.Array]
_Attended = Callable[[jax.Array, jax.Array], _Pair]


@functools.cache
def language_model(config: LmConfig) -> LanguageModel:
    """The decoder of an architecture.

    Equal configs give the same object, so that experts of one architecture can be told by
    ``is`` and a jitted caller is traced once.

    ``prefill`` attends to the prompt alone, so its cache must be empty. With ``last_only``
    it returns the logits after each row's last valid token, on whichever side the padding
    is; otherwise logits in padded columns mean nothing. Reading past the end of a cache is
    not noticed under jit: make it long enough. Positions beyond ``context_length`` are
    computed, but no model was trained there. Scores take ``batch · head · time²`` floats at
    a time in ``prefill`` and ``batch · head · time · length`` in ``extend``: a long prompt
    can be read in pieces by the latter.

    Example:
        >>> config = LmConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2)
        >>> model = language_model(config)
        >>> def read(key, tokens, valid):  # padded on the left; then one token more
        ...     params, cache = init_params(key, config), model.init_cache(1, 8)
        ...     logits, cache = model.prefill(params, tokens, valid, cache, last_only=True)
        ...     return logits, model.step(params, jnp.argmax(logits[:, 0], -1), cache)
        >>> tokens, valid = jnp.array([[0, 3, 5]]), jnp.array([[False, True, True]])
        >>> first, (second, cache) = jax.eval_shape(read, jax.random.key(0), tokens, valid)
        >>> first.shape, second.shape, cache.valid.shape
        ((1, 1, 11), (1, 11), (1, 8))
    """
    return LanguageModel(
        functools.partial(_init_cache, config),
        functools.partial(_prefill, config),
        functools.partial(_extend, config),
        functools.partial(_step, config),
        vocab_size=config.vocab_size,
        context_length=config.context_length,
    )


def init_params(key: jax.Array, config: LmConfig) -> Params:
    """Random parameters to train from; the key is consumed.

    Kernels are normal with variance 1 / fan_in, those that write to the residual stream
    with 1 / (2 · num_layers · fan_in), so that its variance does not grow with depth
    (Radford et al. 2019, "GPT-2", section 2.3); embedding and head have a standard
    deviation of 0.02; norms are one and biases zero.

    Example:
        >>> config = LmConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=2)
        >>> params = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
        >>> params["embed"].shape, sum(leaf.size for leaf in jax.tree.leaves(params))
        ((8, 4), 908)
    """
    key_embed, key_head, key_layers = jax.random.split(key, 3)
    dtype = jnp.dtype(config.dtype)

    def normal(key: jax.Array, shape: tuple[int, int], scale: float) -> jax.Array:
        return (scale * jax.random.normal(key, shape)).astype(dtype)

    params: dict[str, Params] = {
        "embed": normal(key_embed, (config.vocab_size, config.hidden_size), 0.02),
        "layers": [
            _init_layer(layer_key, config, normal)
            for layer_key in jax.random.split(key_layers, config.num_layers)
        ],
        "norm": jnp.ones(config.hidden_size, dtype),
    }
    if not config.tied:
        shape = (config.hidden_size, config.vocab_size)
        params["head"] = normal(key_head, shape, 0.02)
    return params


def _init_layer(
    key: jax.Array, config: LmConfig, normal: Callable[..., jax.Array]
) -> Params:
    dtype, hidden = jnp.dtype(config.dtype), config.hidden_size
    inner, heads = config.intermediate_size, config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    shapes = {
        "q": (hidden, heads),
        "k": (hidden, kv_heads),
        "v": (hidden, kv_heads),
        "o": (heads, hidden),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }
    layer: dict[str, jax.Array] = {}
    keys = jax.random.split(key, len(shapes))
    for kernel_key, (name, shape) in zip(keys, shapes.items(), strict=True):
        depth = 2 * config.num_layers if name in ("o", "down") else 1
        layer[name] = normal(kernel_key, shape, (shape[0] * depth) ** -0.5)
    biased = "qkv" * config.qkv_bias + "o" * config.o_bias
    layer |= {f"{name}_bias": jnp.zeros(shapes[name][1], dtype) for name in biased}
    if config.family == "qwen3":
        layer |= {
            name: jnp.ones(config.head_dim, dtype) for name in ("q_norm", "k_norm")
        }
    return layer | {name: jnp.ones(hidden, dtype) for name in ("attn_norm", "mlp_norm")}


def logits(
    config: LmConfig,
    params: Params,
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
) -> Float[Array, "batch time {config.vocab_size}"]:
    """All positions at once, without a cache: what training and scoring differentiate.

    Returns:
        Float32 logits of the token after each column.

    Example:
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> def score(key):
        ...     tokens = jnp.zeros((4, 32), jnp.int32)
        ...     return logits(config, init_params(key, config), tokens, tokens == 0)
        >>> jax.eval_shape(score, jax.random.key(0)).shape
        (4, 32, 257)
    """
    hidden, _ = _read_all(config, params, tokens, valid)
    return _head(config, params, hidden)


def embed_tokens(
    params: Params, tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch hidden"]:
    """The residual stream before the first layer.

    Example:
        >>> embed_tokens({"embed": jnp.arange(6.0).reshape(3, 2)}, jnp.array([2, 0])).tolist()
        [[4.0, 5.0], [0.0, 1.0]]
    """
    return params["embed"][tokens]


def apply_layer(
    config: LmConfig,
    layer_params: Params,
    hidden: Float[Array, "batch time hidden"],
    valid: Bool[Array, "batch time"],
) -> tuple[Float[Array, "batch time hidden"], dict[str, Float[Array, "batch time _"]]]:
    """One layer over whole texts, for methods that go layer by layer.

    Args:
        config: of the model.
        layer_params: ``params["layers"][i]``.
        hidden: the residual stream before the layer.
        valid: which columns hold a token.

    Returns:
        The stream after the layer, and the inputs of its kernels by the names in
        `LINEAR_INPUTS`. Columns that are not valid hold numbers that mean nothing.

    Example:
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> def first_layer(key):
        ...     layer = init_params(key, config)["layers"][0]
        ...     return apply_layer(config, layer, jnp.zeros((1, 5, 16)), jnp.ones((1, 5), bool))
        >>> hidden, inputs = jax.eval_shape(first_layer, jax.random.key(0))
        >>> hidden.shape, sorted(inputs)
        ((1, 5, 16), ['attn_in', 'down_in', 'mlp_in', 'o_in'])
    """
    by = rotation(config.rope, config.head_dim, _positions(valid))
    return _layer(config, layer_params, hidden, by, _causal(valid), _fresh)[:2]


def _init_cache(config: LmConfig, batch_size: int, length: int) -> KvCache:
    shape = (batch_size, config.num_kv_heads, length, config.head_dim)
    return init_cache(config.num_layers, shape, jnp.dtype(config.dtype))


def _prefill(
    config: LmConfig,
    params: Params,
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
    cache: KvCache,
    *,
    last_only: bool = False,
) -> tuple[Float[Array, "batch _ vocab"], KvCache]:
    check_room(cache, tokens.shape[1])
    hidden, pairs = _read_all(config, params, tokens, valid)
    start = jnp.zeros_like(cache.column)
    keys, values = (
        tuple(
            write_columns(old, new, start) for old, new in zip(olds, news, strict=True)
        )
        for olds, news in zip(
            (cache.keys, cache.values), zip(*pairs, strict=True), strict=True
        )
    )
    cache = mark_columns(cache._replace(keys=keys, values=values), valid)
    if last_only:
        columns = jnp.arange(valid.shape[1])[None]
        last = jnp.max(jnp.where(valid, columns, 0), axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return _head(config, params, hidden), cache


def _extend(
    config: LmConfig,
    params: Params,
    tokens: Int[Array, "batch time"],
    valid: Bool[Array, "batch time"],
    cache: KvCache,
) -> tuple[Float[Array, "batch time vocab"], KvCache]:
    time, length = tokens.shape[1], cache.valid.shape[1]
    check_room(cache, time)
    column, past = cache.column, (cache.keys, cache.values)
    by = rotation(config.rope, config.head_dim, _positions(valid, cache.num_tokens))
    cache = mark_columns(cache, valid)
    reached = jnp.arange(length)[None] <= column + jnp.arange(time)[:, None]
    mask = (cache.valid[:, None] & reached[None])[:, None, None]

    hidden = embed_tokens(params, tokens)
    keys, values = [], []
    for layer, old_keys, old_values in zip(params["layers"], *past, strict=True):

        def write(k: jax.Array, v: jax.Array, old=(old_keys, old_values)) -> _Pair:
            return write_columns(old[0], k, column), write_columns(old[1], v, column)

        hidden, _, (new_keys, new_values) = _layer(
            config, layer, hidden, by, mask, write
        )
        keys.append(new_keys)
        values.append(new_values)
    cache = cache._replace(keys=tuple(keys), values=tuple(values))
    return _head(config, params, hidden), cache


def _step(
    config: LmConfig, params: Params, tokens: Int[Array, "batch"], cache: KvCache
) -> tuple[Float[Array, "batch vocab"], KvCache]:
    valid = jnp.ones((*tokens.shape, 1), bool)
    found, cache = _extend(config, params, tokens[:, None], valid, cache)
    return found[:, 0], cache


def _read_all(
    config: LmConfig, params: Params, tokens: jax.Array, valid: jax.Array
) -> tuple[jax.Array, list[_Pair]]:
    """The stream after the last layer, and each layer's keys and values."""
    if tokens.shape != valid.shape or 0 in tokens.shape:
        raise ValueError(
            f"tokens of shape {tokens.shape} and valid of shape {valid.shape}; expected "
            "the same [batch, time] for both, with at least one column"
        )
    by = rotation(config.rope, config.head_dim, _positions(valid))
    mask, pairs = _causal(valid), []
    hidden = embed_tokens(params, tokens)
    for layer in params["layers"]:
        hidden, _, pair = _layer(config, layer, hidden, by, mask, _fresh)
        pairs.append(pair)
    return hidden, pairs


def _layer(
    config: LmConfig,
    layer: Params,
    hidden: jax.Array,
    by: Rotation,
    mask: Bool[Array, "batch 1 1 query column"],
    attended: _Attended,
) -> tuple[jax.Array, _Inputs, _Pair]:
    """``attended`` turns the fresh keys and values into those that are attended to."""
    attn_in = _norm(config, hidden, layer["attn_norm"])
    q, k, v = (_heads(config, _linear(layer, name, attn_in)) for name in "qkv")
    if config.family == "qwen3":
        q, k = _norm(config, q, layer["q_norm"]), _norm(config, k, layer["k_norm"])
    keys, values = attended(rotate(k, by), v)
    o_in = _attend(config, rotate(q, by), keys, values, mask)
    hidden = hidden + _linear(layer, "o", o_in)
    mlp_in = _norm(config, hidden, layer["mlp_norm"])
    gate = jax.nn.silu(_linear(layer, "gate", mlp_in))
    down_in = gate * _linear(layer, "up", mlp_in)
    hidden = hidden + _linear(layer, "down", down_in)
    inputs = {"attn_in": attn_in, "o_in": o_in, "mlp_in": mlp_in, "down_in": down_in}
    return hidden, inputs, (keys, values)


def _attend(
    config: LmConfig,
    q: Float[Array, "batch head query head_dim"],
    keys: Float[Array, "batch kv_head column head_dim"],
    values: Float[Array, "batch kv_head column head_dim"],
    mask: Bool[Array, "batch 1 1 query column"],
) -> Float[Array, "batch query heads"]:
    """Softmax attention; heads of queries share keys and values in groups."""
    batch, _, time, head_dim = q.shape
    q = q.reshape(batch, config.num_kv_heads, -1, time, head_dim)
    scores = jnp.einsum(
        "bkgtd,bksd->bkgts", q, keys, preferred_element_type=jnp.float32
    )
    # Finite: a column of padding attends to nothing, and must not become NaN for it.
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(mask, scores * head_dim**-0.5, lowest)
    shares = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", shares, values)
    return jnp.moveaxis(mixed.reshape(batch, -1, time, head_dim), 1, 2).reshape(
        batch, time, -1
    )


def _fresh(k: jax.Array, v: jax.Array) -> _Pair:
    return k, v


def _heads(config: LmConfig, x: jax.Array) -> Float[Array, "batch head time head_dim"]:
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, config.head_dim), 2, 1)


def _linear(layer: Params, name: str, x: jax.Array) -> jax.Array:
    out = jnp.einsum("bti,io->bto", x, layer[name])
    bias = layer.get(f"{name}_bias")
    return out if bias is None else out + bias[None, None]


def _norm(config: LmConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square normalisation over the last axis, in float32 (Zhang and Sennrich
    2019, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    unit = (wide * jax.lax.rsqrt(square + config.norm_epsilon)).astype(x.dtype)
    return unit * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _head(config: LmConfig, params: Params, hidden: jax.Array) -> jax.Array:
    hidden = _norm(config, hidden, params["norm"])
    # The tied embedding is contracted as it lies; no transpose of it is made.
    form, kernel = ("bth,vh->btv", "embed") if config.tied else ("bth,hv->btv", "head")
    return jnp.einsum(form, hidden, params[kernel], preferred_element_type=jnp.float32)


def _positions(
    valid: Bool[Array, "batch time"], before: Int[Array, "batch"] | None = None
) -> Int[Array, "batch time"]:
    """How many valid tokens precede each column."""
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    if before is not None:
        count = count + before[:, None]
    return jnp.maximum(count - 1, 0)


def _causal(
    valid: Bool[Array, "batch time"],
) -> Bool[Array, "batch 1 1 time time"]:
    columns = jnp.arange(valid.shape[1])
    past = columns[None] <= columns[:, None]
    return (valid[:, None] & past[None])[:, None, None]
