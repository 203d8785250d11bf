"""Decoding a language model, one or many fused: the prompt, then one scan over tokens.

Prompts of different lengths are padded on the left to a power of two, so that one
compiled program serves every prompt of its bucket and the last column is a token in
each row. Row ``r`` draws token ``i`` from ``fold_in(fold_in(key, r), i)``: neither its
neighbours, nor the padding, nor the cuts of a stream change what a row draws.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import Key as KeyArray

from emfuse_jax.base import LanguageModel, Params, State
from emfuse_jax.energy import log_partition
from emfuse_jax.llm._prompt import (
    bucket_length,
    check_prompt,
    check_stop_tokens,
    check_tokens,
    pad_left,
)
from emfuse_jax.llm.filters import check_filters, is_greedy, sample_token

__all__ = [
    "DecodeState",
    "Generation",
    "bucket_length",
    "check_prompt",
    "check_tokens",
    "decode_tokens",
    "generate",
    "pad_left",
    "start_decoding",
    "token_log_prob",
]

Keys = KeyArray[Array, ""] | KeyArray[Array, "batch"]
"""One key, or one per row."""


class DecodeState(NamedTuple):
    """Where a decode stands between two tokens."""

    cache: State
    logits: Float[Array, "batch vocab"]
    """Of the token to come."""
    token: Int[Array, "batch"]
    """The last one read."""
    stopped: Bool[Array, "batch"]
    step: Int[Array, ""]
    """Tokens decoded so far."""


class Generation(NamedTuple):
    """New tokens. Those that are not ``valid`` came after a row's stop token and repeat
    it; the stop token itself is valid."""

    tokens: Int[Array, "batch time"]
    valid: Bool[Array, "batch time"]
    log_probs: Float[Array, "batch time"]
    """Under the model: before temperature and filters."""
    kept: Any
    """What ``keep`` returned, stacked over ``[time, …]``; None without it."""


def generate(
    params: Params,
    key: Keys,
    model: LanguageModel,
    tokens: Int[Array, "batch prompt"],
    valid: Bool[Array, "batch prompt"],
    max_new_tokens: int,
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
    stop_tokens: Sequence[int] = (),
    keep: Callable[[State], Any] | None = None,
) -> Generation:
    """Reads the prompts and decodes after them.

    Compile it with ``model``, ``max_new_tokens`` and the options closed over; then there
    is one program per shape of ``tokens``. `stream.compile_decoder` does, and ends early.

    Args:
        params: the model's.
        key: not consumed: row ``r`` uses ``fold_in(key, r)``, or its own key where there
            is one per row, and token ``i`` ``fold_in`` of that with ``i``.
        model: any language model; a fusion of several is one.
        tokens: prompts, padded on the left (`pad_left`).
        valid: false for padding.
        max_new_tokens: static number of tokens to decode.
        temperature: 0 is greedy, 1 the model's own law.
        top_k: keep the likeliest, see `filters`.
        top_p: keep the likeliest that hold this mass.
        min_p: keep those at least so likely, relative to the likeliest.
        stop_tokens: a row stops after any of these.
        keep: called with the cache that predicts the token at hand, before that token
            is read (of a fused model: expert choices, weights, divergences).

    Raises:
        ValueError: if an option is outside its range or, where their values are at hand
            (outside of ``jit``), a prompt is empty, does not end in the last column, or
            leaves no room in the context.

    Example:
        >>> import functools
        >>> from emfuse_jax.llm import LmConfig, init_params, language_model, pad_left
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> tokens, valid = pad_left([[65, 66, 67], [65]])
        >>> write = functools.partial(generate, model=language_model(config), max_new_tokens=8)
        >>> params = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
        >>> jax.eval_shape(  # jax.jit(write)(params, key, tokens=tokens, valid=valid) writes
        ...     write, params, jax.random.key(1), tokens=tokens, valid=valid
        ... ).tokens.shape
        (2, 8)
    """
    state = start_decoding(params, model, tokens, valid, max_new_tokens)
    _, generation = decode_tokens(
        params,
        key,
        model,
        state,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_tokens=stop_tokens,
        keep=keep,
    )
    return generation


def start_decoding(
    params: Params,
    model: LanguageModel,
    tokens: Int[Array, "batch prompt"],
    valid: Bool[Array, "batch prompt"],
    max_new_tokens: int,
) -> DecodeState:
    """Reads the prompts into a cache with room for ``max_new_tokens`` more.

    Raises:
        ValueError: as `check_prompt`, or if ``max_new_tokens`` is not positive.

    Example:
        >>> from emfuse_jax.llm import LmConfig, init_params, language_model, pad_left
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> tokens, valid = pad_left([[65, 66, 67], [65]])
        >>> state = jax.eval_shape(
        ...     lambda key: start_decoding(
        ...         init_params(key, config), language_model(config), tokens, valid, 8
        ...     ),
        ...     jax.random.key(0),
        ... )
        >>> state.logits.shape, state.cache.valid.shape[1] - tokens.shape[1]  # and room for 8
        ((2, 257), 8)
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; expected a positive number")
    check_prompt(model, tokens, valid, max_new_tokens)
    batch, time = tokens.shape
    cache = model.init_cache(batch, time + max_new_tokens)
    logits, cache = model.prefill(params, tokens, valid, cache, last_only=True)
    return DecodeState(
        # Weakly typed leaves would leave the first chunk strong: a second program.
        cache=jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), cache),
        logits=logits[:, -1].astype(jnp.float32),
        token=tokens[:, -1],
        stopped=jnp.zeros(batch, bool),
        step=jnp.zeros((), jnp.int32),
    )


def decode_tokens(
    params: Params,
    key: Keys,
    model: LanguageModel,
    state: DecodeState,
    num_tokens: int,
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
    stop_tokens: Sequence[int] = (),
    keep: Callable[[State], Any] | None = None,
) -> tuple[DecodeState, Generation]:
    """Decodes ``num_tokens`` more tokens; calls in a row equal one long call.

    Rows that have stopped are carried along: their tokens mean nothing.

    Args:
        params: the model's.
        key: the run's key, the same in every call.
        model: any language model.
        state: from `start_decoding` or an earlier call, with room in its cache.
        num_tokens: static.
        temperature: as in `generate`, and so the other options.
        top_k: see there.
        top_p: see there.
        min_p: see there.
        stop_tokens: see there.
        keep: see there.

    Raises:
        ValueError: if an option is outside its range.

    Example:
        >>> from emfuse_jax.llm import LmConfig, init_params, language_model, pad_left
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> model, (tokens, valid) = language_model(config), pad_left([[65, 66, 67], [65]])
        >>> def two_calls(key):
        ...     params = init_params(key, config)
        ...     state = start_decoding(params, model, tokens, valid, 8)
        ...     state, first = decode_tokens(params, key, model, state, 5)
        ...     state, rest = decode_tokens(params, key, model, state, 3)
        ...     return first.tokens, rest.tokens
        >>> [part.shape for part in jax.eval_shape(two_calls, jax.random.key(0))]
        [(2, 5), (2, 3)]
    """
    check_filters(temperature, top_k, top_p, min_p)
    check_stop_tokens(stop_tokens, model.vocab_size)
    row_keys = key
    if key.ndim == 0:
        rows = jnp.arange(state.token.shape[0])
        row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
    draw = functools.partial(
        sample_token, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )

    def choose(row_key: jax.Array, step: jax.Array, logits: jax.Array) -> jax.Array:
        return draw(jax.random.fold_in(row_key, step), logits)

    def step(carry: DecodeState, _: None) -> tuple[DecodeState, tuple[Any, ...]]:
        if is_greedy(temperature):
            drawn = jnp.argmax(carry.logits, axis=-1)
        else:
            each = jax.vmap(choose, in_axes=(0, None, 0))
            drawn = each(row_keys, carry.step, carry.logits)
        token = jnp.where(carry.stopped, carry.token, drawn.astype(carry.token.dtype))
        log_prob = token_log_prob(carry.logits, token)
        kept = None if keep is None else keep(carry.cache)
        logits, cache = model.step(params, token, carry.cache)
        stopped = carry.stopped
        for stop_token in stop_tokens:
            stopped = stopped | (token == stop_token)
        following = DecodeState(
            cache, logits.astype(jnp.float32), token, stopped, carry.step + 1
        )
        return following, (token, ~carry.stopped, log_prob, kept)

    state, (tokens, valid, log_probs, kept) = jax.lax.scan(
        step, state, None, length=num_tokens
    )
    return state, Generation(tokens.T, valid.T, log_probs.T, kept)


def token_log_prob(
    logits: Float[Array, "*batch vocab"], token: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Log-probability of one token per row; ``-inf`` where all are impossible.

    Example:
        >>> print(f"{token_log_prob(jnp.zeros(4), jnp.array(1)):.4f}")
        -1.3863
    """
    log_z = log_partition(-logits)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return jnp.where(log_z == -jnp.inf, -jnp.inf, chosen - log_z)
