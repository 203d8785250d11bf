"""Prompts: padded into buckets, and checked before anything is traced."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from emfuse_jax.base import LanguageModel


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


def check_stop_tokens(stop_tokens: Sequence[int], vocab_size: int) -> None:
    for token in stop_tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"stop token {token} is not in the vocabulary 0 … {vocab_size - 1}"
            )
