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
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
from jaxtyping import Key as KeyArray

from emfuse_jax.base import LanguageModel, Params, State
from emfuse_jax.energy import log_partition
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
    _check_stop_tokens(stop_tokens, model.vocab_size)
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


def bucket_length(length: int, *, minimum: int = 16, maximum: int | None = None) -> int:
    """The next power of two, between ``minimum`` and ``maximum``.

    Args:
        length: of what has to fit.
        minimum: the smallest bucket.
        maximum: the largest, whether a power of two or not: the context's length.

    Raises:
        ValueError: if ``length`` exceeds ``maximum``.

    Example:
        >>> [bucket_length(n) for n in (1, 16, 17, 100)]
        [16, 16, 32, 128]
    """
    if maximum is not None and length > maximum:
        raise ValueError(f"{length} tokens do not fit into {maximum}; cut them")
    bucket = max(minimum, 1 << max(length - 1, 0).bit_length())
    return bucket if maximum is None else min(bucket, maximum)


def pad_left(
    sequences: Sequence[Sequence[int]],
    *,
    length: int | None = None,
    pad_token: int = 0,
) -> tuple[Int[Array, "batch time"], Bool[Array, "batch time"]]:
    """Sequences of tokens as ``(tokens, valid)``, flush right.

    Args:
        sequences: one per row, of any lengths.
        length: of the rows; the bucket of the longest by default.
        pad_token: what padding is made of; models never see it.

    Raises:
        ValueError: if a sequence is longer than ``length``.

    Example:
        >>> tokens, valid = pad_left([[5, 6], [7]], length=3)
        >>> tokens.tolist(), valid.astype(int).tolist()
        ([[0, 5, 6], [0, 0, 7]], [[0, 1, 1], [0, 0, 1]])
    """
    longest = max((len(sequence) for sequence in sequences), default=0)
    if length is None:
        length = bucket_length(longest)
    if longest > length:
        raise ValueError(f"a sequence of {longest} tokens does not fit into {length}")
    tokens = np.full((len(sequences), length), pad_token, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, sequence in enumerate(sequences):
        tokens[row, length - len(sequence) :] = sequence
        valid[row, length - len(sequence) :] = True
    return jnp.asarray(tokens), jnp.asarray(valid)


def check_prompt(
    model: LanguageModel, tokens: Any, valid: Any, new_tokens: Any
) -> None:
    """Checks left-padded prompts on the host; traced ones pass unseen.

    Args:
        model: whose context and vocabulary they have to fit.
        tokens: ``[batch, time]``.
        valid: ``[batch, time]``.
        new_tokens: how many tokens are read after them: one number, or ``[batch]``.

    Raises:
        ValueError: if a prompt is empty, is not padded on the left, names a token that
            the vocabulary lacks, or leaves no room for the new tokens.

    Example:
        >>> from emfuse_jax.llm import LmConfig, language_model
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> model = language_model(config)
        >>> check_prompt(model, [[0, 0, 65]], [[False, False, True]], 10)
        >>> check_prompt(model, [[65, 0, 0]], [[True, False, False]], 10)
        Traceback (most recent call last):
            ...
        ValueError: prompt 0 ends in padding; pad prompts on the left (pad_left does)
    """
    if isinstance(tokens, Tracer) or isinstance(valid, Tracer):
        return
    valid = np.asarray(valid)
    if len(valid) == 0:
        raise ValueError("there is no prompt; give one at least")
    lengths = valid.sum(axis=1)
    if not lengths.all():
        raise ValueError(
            f"prompt {int(np.argmin(lengths))} is empty; give it one token at least, "
            "such as the tokenizer's beginning- or end-of-text token"
        )
    if not valid[:, -1].all():
        raise ValueError(
            f"prompt {int(np.argmin(valid[:, -1]))} ends in padding; pad prompts on the "
            "left (pad_left does)"
        )
    check_tokens(model, tokens, valid, "prompt")
    new = np.broadcast_to(np.asarray(new_tokens), lengths.shape)
    row = int(np.argmax(lengths + new))
    room = model.context_length - int(new[row])
    if lengths[row] > room:
        fix = f"cut the prompt to {room} tokens, or ask for fewer new ones"
        raise ValueError(
            f"prompt {row} has {lengths[row]} tokens and {new[row]} more are to follow, "
            f"but the model's context holds {model.context_length}; "
            + (fix if room > 0 else "ask for fewer new tokens")
        )


def check_tokens(model: LanguageModel, tokens: Any, valid: Any, name: str) -> None:
    """Checks on the host that tokens are in the vocabulary; traced ones pass unseen.

    Out of range a lookup would silently take the last token instead.

    Args:
        model: whose vocabulary it is.
        tokens: ``[batch, time]``.
        valid: false for padding.
        name: what the error calls a row.

    Raises:
        ValueError: naming the first row and token that is not.

    Example:
        >>> from emfuse_jax.llm import LmConfig, language_model
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> check_tokens(language_model(config), [[65, 300]], [[True, True]], "prompt")
        Traceback (most recent call last):
            ...
        ValueError: prompt 0 holds token 300, the model's vocabulary is 0 … 256; ...
    """
    if isinstance(tokens, Tracer) or isinstance(valid, Tracer):
        return
    tokens = np.asarray(tokens)
    outside = np.asarray(valid) & ((tokens < 0) | (tokens >= model.vocab_size))
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"{name} {row} holds token {tokens[row, column]}, the model's vocabulary "
            f"is 0 … {model.vocab_size - 1}; use the tokenizer that belongs to it"
        )


def _check_stop_tokens(stop_tokens: Sequence[int], vocab_size: int) -> None:
    for token in stop_tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"stop token {token} is not in the vocabulary 0 … {vocab_size - 1}"
            )
