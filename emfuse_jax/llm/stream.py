"""Text as it is decoded: a host loop over compiled chunks of tokens.

The loop hops to the host once per chunk, so that text can be shown while it grows and a
decode can end early: at a stop token (seen on the device) or at a stop string (seen in
the text, whichever tokens its letters come from). Text is handed out only once no later
token can change it: what may be the beginning of a stop string, and characters whose
bytes are not complete yet, are held back.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from emfuse_jax.base import LanguageModel, Params, State
from emfuse_jax.llm.decode import (
    DecodeState,
    Generation,
    Keys,
    bucket_length,
    check_prompt,
    decode_tokens,
    pad_left,
    start_decoding,
)

__all__ = [
    "Completion",
    "Decoder",
    "Detokenize",
    "Finish",
    "Piece",
    "compile_decoder",
    "complete",
    "settled_text",
    "stream_chunks",
    "stream_text",
]

Detokenize = Callable[[list[int]], str]
"""``tokens -> text``; the text of more tokens has to begin with that of fewer."""

Finish = Literal["stop_token", "stop_string", "length"]
"""Why a row ended."""


class Decoder(NamedTuple):
    """A language model and its decoding options, compiled once per bucket.

    ``start(params, tokens, valid, room) -> state``;
    ``advance(params, key, state) -> (state, generation)`` decodes one chunk and uses the
    memory of ``state`` up.
    """

    start: Callable[..., DecodeState]
    advance: Callable[..., tuple[DecodeState, Generation]]
    model: LanguageModel
    chunk: int
    stop_tokens: tuple[int, ...]


class Piece(NamedTuple):
    """What one chunk added. ``text`` lags behind ``tokens`` while some is held back;
    the stop string, and the text of a stop token, are in none.

    ``kept`` has leaves ``[time, batch, …]`` for these tokens, as `Generation` has.
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    kept: Any
    finish: Finish | None


class Completion(NamedTuple):
    """A whole decode of one prompt: its text, its tokens up to and with the one that
    ended it, and why it ended."""

    text: str
    tokens: list[int]
    log_probs: list[float]
    finish: Finish


def compile_decoder(
    model: LanguageModel,
    *,
    chunk: int = 16,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
    stop_tokens: Sequence[int] = (),
    keep: Callable[[State], Any] | None = None,
) -> Decoder:
    """Compiles, when first used, a program per number of rows, bucket and room.

    Make one and use it for every prompt: the programs belong to it. Like `loops.fit`
    with a callback, this is a host path that jits.

    Args:
        model: any language model.
        chunk: tokens per hop to the host. Fewer show text sooner, more cost less.
        temperature: as in `decode.generate`, and so the other options.
        top_k: see there.
        top_p: see there.
        min_p: see there.
        stop_tokens: see there.
        keep: see there.

    Raises:
        ValueError: if ``chunk`` is not positive. The options are checked when first used.

    Example:
        >>> from emfuse_jax.llm import LmConfig, language_model
        >>> config = LmConfig(vocab_size=257, hidden_size=16, num_layers=1, num_heads=2)
        >>> decoder = compile_decoder(language_model(config), chunk=8, temperature=0.0)
        >>> decoder.chunk  # a program is compiled at the first text, and kept
        8
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; expected a positive number of tokens")
    stop_tokens = tuple(stop_tokens)

    def advance(
        params: Params, key: jax.Array, state: DecodeState
    ) -> tuple[DecodeState, Generation]:
        return decode_tokens(
            params,
            key,
            model,
            state,
            chunk,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            stop_tokens=stop_tokens,
            keep=keep,
        )

    def start(
        params: Params, tokens: jax.Array, valid: jax.Array, room: int
    ) -> DecodeState:
        return start_decoding(params, model, tokens, valid, room)

    return Decoder(
        start=jax.jit(start, static_argnums=3),
        advance=jax.jit(advance, donate_argnums=2),
        model=model,
        chunk=chunk,
        stop_tokens=stop_tokens,
    )


def stream_chunks(
    params: Params,
    key: Keys,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> Iterator[Generation]:
    """Yields the new tokens of all prompts chunk by chunk, as NumPy arrays on the host.

    Ends when every row has stopped or ``max_new_tokens`` are there (the last chunk is
    decoded whole and cut). Stop iterating to end it earlier.

    Args:
        params: the model's.
        key: as in `decode.generate`.
        decoder: from `compile_decoder`.
        prompts: the tokens of each row.
        max_new_tokens: at most so many.

    Raises:
        ValueError: as `decode.check_prompt`.
    """
    model, chunk = decoder.model, decoder.chunk
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; expected a positive number")
    longest = max((len(prompt) for prompt in prompts), default=0)
    # A prompt that exceeds the context keeps its length, for the check to name it.
    largest = max(model.context_length, longest)
    tokens, valid = pad_left(prompts, length=bucket_length(longest, maximum=largest))
    check_prompt(model, tokens, valid, max_new_tokens)
    # Room in whole chunks: one program serves every length up to the next multiple.
    room = -(-max_new_tokens // chunk) * chunk
    state = decoder.start(params, tokens, valid, room)
    for first in range(0, max_new_tokens, chunk):
        state, generation = decoder.advance(params, key, state)
        wanted = min(chunk, max_new_tokens - first)
        generation, stopped = jax.device_get((generation, state.stopped))
        yield Generation(
            tokens=generation.tokens[:, :wanted],
            valid=generation.valid[:, :wanted],
            log_probs=generation.log_probs[:, :wanted],
            kept=jax.tree.map(lambda leaf, n=wanted: leaf[:n], generation.kept),
        )
        if np.all(stopped):
            return


def stream_text(
    params: Params,
    key: Keys,
    decoder: Decoder,
    detokenize: Detokenize,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    stop_strings: Sequence[str] = (),
) -> Iterator[Piece]:
    """Yields the text that follows one prompt while it is decoded.

    The pieces' texts together are what `complete` returns; the last has a ``finish``.

    Args:
        params: the model's.
        key: as in `decode.generate`.
        decoder: from `compile_decoder`.
        detokenize: ``tokens -> text``, such as a tokenizer's ``decode``.
        prompt: tokens.
        max_new_tokens: at most so many.
        stop_strings: the text ends before the first of these.

    Raises:
        ValueError: as `decode.check_prompt`, or if a stop string is empty.
    """
    _check_stop_strings(stop_strings)
    tokens: list[int] = []
    shown = 0
    for part in stream_chunks(params, key, decoder, [prompt], max_new_tokens):
        new = part.tokens[0][part.valid[0]].tolist()
        count, finish = _find_end(
            tokens, new, decoder.stop_tokens, detokenize, stop_strings
        )
        tokens += new[:count]
        if finish is None and len(tokens) == max_new_tokens:
            finish = "length"
        text = _text(tokens, decoder.stop_tokens, detokenize)
        text, _ = settled_text(text, stop_strings, final=finish is not None)
        yield Piece(
            text=text[shown:],
            tokens=new[:count],
            log_probs=part.log_probs[0][:count].tolist(),
            kept=jax.tree.map(lambda leaf, n=count: leaf[:n], part.kept),
            finish=finish,
        )
        shown = max(shown, len(text))
        if finish is not None:
            return


def complete(
    params: Params,
    key: Keys,
    decoder: Decoder,
    detokenize: Detokenize,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_strings: Sequence[str] = (),
) -> list[Completion]:
    """Completes a batch of prompts; ends as soon as every row has.

    Args:
        params: the model's.
        key: as in `decode.generate`.
        decoder: from `compile_decoder`.
        detokenize: ``tokens -> text``.
        prompts: the tokens of each row.
        max_new_tokens: at most so many for each.
        stop_strings: a text ends before the first of these.

    Raises:
        ValueError: as `stream_text`.

    Example:
        >>> from emfuse_jax.llm import ByteTokenizer, LmConfig, init_params, language_model
        >>> config = LmConfig(vocab_size=257, hidden_size=8, num_layers=1, num_heads=1)
        >>> params = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
        >>> params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
        >>> decoder = compile_decoder(language_model(config), chunk=4, temperature=0.0)
        >>> text = ByteTokenizer()
        >>> (done,) = complete(
        ...     params, jax.random.key(0), decoder, text.decode, [text.encode("ab")], 4
        ... )
        >>> done.finish
        'length'
    """
    _check_stop_strings(stop_strings)
    tokens: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    finishes: list[Finish | None] = [None for _ in prompts]
    for part in stream_chunks(params, key, decoder, prompts, max_new_tokens):
        for row in range(len(prompts)):
            if finishes[row] is not None:
                continue
            new = part.tokens[row][part.valid[row]].tolist()
            count, finishes[row] = _find_end(
                tokens[row], new, decoder.stop_tokens, detokenize, stop_strings
            )
            tokens[row] += new[:count]
            log_probs[row] += part.log_probs[row][:count].tolist()
        if all(finish is not None for finish in finishes):
            break
    completions = []
    for row, finish in enumerate(finishes):
        text = _text(tokens[row], decoder.stop_tokens, detokenize)
        text, _ = settled_text(text, stop_strings, final=True)
        done: Finish = "length" if finish is None else finish
        completions.append(Completion(text, tokens[row], log_probs[row], done))
    return completions


def settled_text(
    text: str, stop_strings: Sequence[str] = (), *, final: bool = False
) -> tuple[str, bool]:
    """The part of a growing text that no later token can change, and whether it ended.

    Left out are the first stop string and what follows it; and, unless ``final``, a
    tail that may become a stop string and trailing replacement characters (a decoder's
    answer to bytes whose character is not complete).

    Args:
        text: all of it so far.
        stop_strings: none of them empty.
        final: nothing more will come.

    Example:
        >>> settled_text("One.\\n\\nQ", ["\\n\\nQ:"])
        ('One.', False)
        >>> settled_text("One.\\n\\nQ: Two", ["\\n\\nQ:"])
        ('One.', True)
    """
    ends = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
    if ends:
        return text[: min(ends)], True
    if final:
        return text, False
    text = text.rstrip("\ufffd")
    held = 0
    for stop in stop_strings:
        for size in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:size]):
                held = size
                break
    return text[: len(text) - held], False


def _find_end(
    tokens: list[int],
    new: list[int],
    stop_tokens: Sequence[int],
    detokenize: Detokenize,
    stop_strings: Sequence[str],
) -> tuple[int, Finish | None]:
    """How many of the new tokens count, and why no more do."""

    def stopped(count: int) -> bool:
        text = _text(tokens + new[:count], stop_tokens, detokenize)
        return settled_text(text, stop_strings)[1]

    if stop_strings and new and stopped(len(new)):
        # The token that completes the string is the last that counts.
        return next(n for n in range(1, len(new) + 1) if stopped(n)), "stop_string"
    if new and new[-1] in stop_tokens:
        return len(new), "stop_token"
    return len(new), None


def _text(tokens: list[int], stop_tokens: Sequence[int], detokenize: Detokenize) -> str:
    ended = bool(tokens) and tokens[-1] in stop_tokens
    return detokenize(tokens[:-1] if ended else tokens)


def _check_stop_strings(stop_strings: Sequence[str]) -> None:
    if isinstance(stop_strings, str):
        raise ValueError(
            f"stop_strings is the string {stop_strings!r}; expected a sequence, as "
            f"[{stop_strings!r}]"
        )
    if any(not stop for stop in stop_strings):
        raise ValueError(
            "a stop string is empty, so that every text would end at once; leave it out"
        )
