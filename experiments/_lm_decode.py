"""Decoding at a command line: text as it grows, which expert chose it, and chat."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import LanguageModel
from emfuse_jax.data.text import read_text
from emfuse_jax.evaluation.language import expert_divergence
from emfuse_jax.llm.decode import check_prompt, pad_left
from emfuse_jax.llm.emselect import pool_divergences
from emfuse_jax.llm.filters import check_filters
from emfuse_jax.llm.fuse import FusedCache, linear_opinion_pool
from emfuse_jax.llm.stream import Decoder, compile_decoder, stream_text
from experiments import _lm_text
from experiments._lm_experts import Experts, fuse_rule
from experiments._lm_rules import NamedRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How text is drawn.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 is greedy, 1 the fused law itself.
        top_k: keep the likeliest; none keeps all.
        top_p: keep the likeliest that hold this mass.
        min_p: keep those at least so likely, relative to the likeliest.
        stop: strings before which the text ends; \\n is a new line.
        special: put before a prompt what the tokenizer puts before a text.
        chunk: tokens per look at the text; fewer show it sooner, more are faster.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    stop: tuple[str, ...] = ()
    special: bool = True
    chunk: int = 8

    def __post_init__(self) -> None:
        check_filters(self.temperature, self.top_k, self.top_p, self.min_p)
        for name in ("max_new_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not all(self.stop):
            raise ValueError("a stop string is empty; leave it out, or write \\n")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """With the new lines that the command line cannot hold."""
        return tuple(
            text.replace("\\n", "\n").replace("\\t", "\t") for text in self.stop
        )


class Voice(NamedTuple):
    """A fusion that can be asked for text, compiled once."""

    experts: Experts
    params: Any
    rule: NamedRule
    model: LanguageModel
    decoder: Decoder
    sampling: Sampling


def make_voice(
    experts: Experts, params: Any, rule: NamedRule, sampling: Sampling
) -> Voice:
    """The fusion of the experts under one rule.

    Args:
        experts: opened.
        params: from `join_params`.
        rule: the rule.
        sampling: how text is drawn.

    Raises:
        ValueError: as `fuse_language_models`.
    """
    model = fuse_rule(experts, rule.rule)
    decoder = compile_decoder(
        model,
        chunk=sampling.chunk,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        stop_tokens=experts.stop_ids,
        keep=watch(rule),
    )
    return Voice(experts, params, rule, model, decoder, sampling)


def watch(rule: NamedRule) -> Callable[[FusedCache], dict[str, jax.Array]]:
    """What is written down of each token: ``[batch, expert]``, laws ``[batch, expert,
    vocab]``.

    ``divergence`` is ``KL(q ‖ p_i)``, of the fused law or, where a rule selects, of the
    uniform pool that the selected expert stands for.
    """

    def keep(cache: FusedCache) -> dict[str, jax.Array]:
        log_probs, weights = cache.log_probs, cache.weights
        if rule.rule.linear:
            fused = linear_opinion_pool(log_probs, weights)
            divergence = expert_divergence(fused, log_probs)
        else:
            pooled = None if rule.selects else weights
            divergence = pool_divergences(log_probs, pooled)
        return {
            "weights": weights.T,
            "divergence": divergence.T,
            "log_probs": jnp.moveaxis(log_probs, 0, 1),
        }

    return keep


def read_prompts(path: str) -> list[str]:
    """One prompt, or one per line of a ``.jsonl`` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, holds no text, or a line is no prompt.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty; a prompt needs some text")
    if pathlib.Path(path).suffix != ".jsonl":
        return [text]
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            prompt = json.loads(line)["prompt"] if line.strip() else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}: line {number} is not {{"prompt": "..."}} ({error!r})'
            ) from error
        if prompt is not None and not (isinstance(prompt, str) and prompt):
            raise ValueError(f"{path}: line {number} has an empty prompt")
        prompts += [] if prompt is None else [prompt]
    return prompts


def prompt_tokens(experts: Experts, text: str, sampling: Sampling) -> list[int]:
    """A prompt's tokens in the fusion's vocabulary."""
    return list(experts.tokenizer.encode(text, special=sampling.special))


def check_fits(voice: Voice, tokens: Sequence[int]) -> None:
    """Refuses a prompt before anything is written.

    Raises:
        ValueError: if it is empty or leaves no room in the context.
    """
    padded, valid = pad_left([tokens], length=max(len(tokens), 1))
    check_prompt(voice.model, padded, valid, voice.sampling.max_new_tokens)


def decode_passage(
    voice: Voice,
    key: jax.Array,
    tokens: Sequence[int],
    *,
    prompt: str,
    painter: _lm_text.Painter | None = None,
    interruptible: bool = False,
) -> dict[str, Any]:
    """Continues a prompt; the text is written while it grows.

    Args:
        voice: what speaks.
        key: not consumed.
        tokens: the prompt's.
        prompt: its text, for the record.
        painter: writes the text; None is silent.
        interruptible: whether Ctrl-C ends the passage where it is, and no more.

    Returns:
        A passage (`_lm_text`), with ``finish``, ``seconds``, the tokens and, per token,
        each expert's divergence.
    """
    start = time.monotonic()
    text, finish, tokens_out = "", "interrupted", []
    log_probs: list[float] = []
    rows: dict[str, list[np.ndarray]] = {"weights": [], "divergence": [], "own": []}
    detokenize = voice.experts.tokenizer.decode
    pieces = stream_text(
        voice.params,
        key,
        voice.decoder,
        detokenize,
        tokens,
        voice.sampling.max_new_tokens,
        stop_strings=voice.sampling.stop_strings,
    )
    painted = 0
    try:
        for piece in pieces:
            tokens_out += piece.tokens
            log_probs += piece.log_probs
            for name in ("weights", "divergence"):
                rows[name] += list(piece.kept[name][:, 0])
            own = zip(piece.kept["log_probs"][:, 0], piece.tokens, strict=True)
            rows["own"] += [laws[:, token] for laws, token in own]
            if painter is not None:
                painted = _feed(voice, painter, tokens_out, rows, painted)
                painter.write(piece.text)
            text += piece.text
            finish = piece.finish or finish
    except KeyboardInterrupt:
        if not interruptible:
            raise
        print(" (interrupted)", file=sys.stderr)
    return {
        "rule": voice.rule.label,
        "moves": voice.rule.moves,
        "prompt": prompt,
        "text": text,
        "finish": finish,
        "seconds": time.monotonic() - start,
        "tokens": tokens_out,
        "token_texts": _shown_texts(voice, tokens_out, finish, text),
        "log_probs": log_probs,
        "weights": rows["weights"],
        "expert_log_probs": rows["own"],
        "divergence": rows["divergence"],
    }


def _feed(
    voice: Voice,
    painter: _lm_text.Painter,
    tokens: Sequence[int],
    rows: dict[str, list[np.ndarray]],
    painted: int,
) -> int:
    """Tells the painter the new tokens; one that may still grow waits for the next."""
    # A few tokens before are enough to see how the new ones join on.
    begin = max(0, painted - 8)
    texts = _lm_text.token_texts(tokens[begin:], voice.experts.tokenizer.decode)
    end = len(tokens)
    while end > painted and texts[end - 1 - begin].endswith("\ufffd"):
        end -= 1
    chosen, _ = _lm_text.choices(
        rows["weights"][painted:end], rows["own"][painted:end], moves=voice.rule.moves
    )
    painter.add(texts[painted - begin : end - begin], chosen.tolist())
    return end


def _shown_texts(
    voice: Voice, tokens: Sequence[int], finish: str, text: str
) -> list[str]:
    """Texts of the tokens that together are the shown text; what a stop cut off is ''."""
    texts = _lm_text.token_texts(tokens, voice.experts.tokenizer.decode)
    if finish == "stop_token":
        texts[-1] = ""
    room = len(text)
    for index, piece in enumerate(texts):
        texts[index] = piece[:room]
        room -= len(texts[index])
    return texts


def summary(passage: dict[str, Any], names: Sequence[str]) -> str:
    """One line on a passage."""
    count = len(passage["tokens"])
    shares = _lm_text.shares(passage, names)
    parts = [f"{_lm_text.short(name)} {100 * s:.0f} %" for name, s in shares.items()]
    return (
        f"{passage['rule']}: {count} tokens ({passage['finish']}), "
        f"{count / max(passage['seconds'], 1e-9):.0f} per second with compiling; "
        f"{', '.join(parts)} ({_lm_text.legend(passage['moves'])})"
    )
