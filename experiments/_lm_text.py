"""Text whose tokens are coloured by expert: on a terminal, in one HTML file, in print.

A *passage* is a dict as JSON holds it: ``rule``, ``prompt``, ``token_texts``, ``log_probs
[token]``, ``weights [token][expert]``, ``expert_log_probs [token][expert]``, ``moves``
(whether the rule's weights change from token to token), and optionally ``truth``: what the
tokens are, where the text was given and not decoded.
"""

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from experiments._figure import COLOURS

Passage = Mapping[str, Any]

_HUES = [COLOURS[name] for name in ("blue", "orange", "green", "purple", "vermillion")]
_HUES += [COLOURS[name] for name in ("sky", "black", "yellow")]
# The nearest of a terminal's 256 colours, light enough for a dark background.
_TERMINAL = (33, 214, 36, 175, 202, 117, 250, 227)
# Control characters as their pictures: a model's text must not steer a terminal.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {code: 0xFFFD for code in range(0x7F, 0xA0)}


def choices(
    weights: Any,
    expert_log_probs: Any,
    *,
    moves: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """The expert that each token is coloured by, and how clearly, in [0, 1].

    The one of the largest weight; where weights do not move within a text they say nothing
    of a token, and the one that found it likeliest is taken.

    Args:
        weights: ``[token, expert]``.
        expert_log_probs: of the tokens, ``[token, expert]``.
        moves: whether the rule's weights change from token to token.
    """
    shares = np.asarray(weights, float)
    if not moves:
        log_probs = np.asarray(expert_log_probs, float)
        log_probs = np.where(np.isfinite(log_probs), log_probs, -1e3)
        relative = np.exp(log_probs - log_probs.max(-1, keepdims=True))
        shares = relative / relative.sum(-1, keepdims=True)
    if shares.size == 0:
        return np.zeros(0, int), np.zeros(0)
    even = 1.0 / shares.shape[-1]
    lead = (shares.max(-1) - even) / max(1.0 - even, 1e-9)
    return shares.argmax(-1), np.clip(lead, 0.0, 1.0)


def legend(moves: bool) -> str:
    """What the colours mean."""
    if moves:
        return "colour: the expert of the largest weight"
    return "colour: the expert that finds the token likeliest (weights are steady)"


def token_texts(
    tokens: Sequence[int], detokenize: Callable[[list[int]], str]
) -> list[str]:
    """What each token adds to the text; the bytes of a character that takes several tokens
    come with the last of them.

    Example:
        >>> pieces = {0: b"a", 1: b"\\xc3", 2: b"\\xa4"}
        >>> join = lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace")
        >>> token_texts([0, 1, 2], join)
        ['a', '', 'ä']
    """
    return [text for text, _ in zip(_grow(tokens, detokenize), tokens, strict=True)]


def _grow(
    tokens: Sequence[int], detokenize: Callable[[list[int]], str]
) -> Iterator[str]:
    # Only the last complete piece is decoded again: what a token looks like may depend on
    # its neighbour, but not on the whole text.
    begin = read = 0
    for end in range(1, len(tokens) + 1):
        before = detokenize(list(tokens[begin:read]))
        text = detokenize(list(tokens[begin:end]))
        if text.endswith("\ufffd") and end < len(tokens) and end - read < 8:
            yield ""
            continue
        yield text[len(before) :]
        begin, read = read, end


class Painter:
    """Writes text as it settles, each token in the colour of its expert.

    Args:
        stream: where to.
        colour: whether to colour at all.
    """

    def __init__(self, stream: TextIO, *, colour: bool) -> None:
        self._stream, self._colour = stream, colour
        self._queue: list[tuple[str, int]] = []

    def add(self, texts: Sequence[str], experts: Sequence[int]) -> None:
        """Says what the next tokens are; nothing is written yet."""
        self._queue += zip(texts, map(int, experts), strict=True)

    def write(self, text: str) -> None:
        """Writes the next settled characters of the tokens that were added."""
        if self._colour or self._stream.isatty():
            text = printable(text)
        if not self._colour:
            self._stream.write(text)
        while text and self._colour:
            if not self._queue:
                self._stream.write(text)
                break
            piece, expert = self._queue.pop(0)
            if len(piece) > len(text):
                self._queue.insert(0, (piece[len(text) :], expert))
            # The text itself is written, not the pieces: no slip can change it.
            shown, text = text[: len(piece)], text[len(piece) :]
            self._stream.write(paint(shown, expert) if shown else "")
        self._stream.flush()


def printable(text: str) -> str:
    """The text, of the same length, without what a terminal would obey.

    Example:
        >>> printable("a\\tb\\x1b[2J")
        'a\\tb␛[2J'
    """
    return text.translate(_PICTURES)


def paint(text: str, expert: int) -> str:
    """Text in an expert's colour, as terminals understand it."""
    return f"\x1b[38;5;{_TERMINAL[expert % len(_TERMINAL)]}m{text}\x1b[0m"


def painted_names(names: Sequence[str]) -> str:
    """The experts' names, each in its colour."""
    return "  ".join(paint(short(name), i) for i, name in enumerate(names))


def short(name: str) -> str:
    """``python`` for ``expert-python``."""
    return name.removeprefix("expert-") or name


def show(passage: Passage, names: Sequence[str], *, colour: bool) -> str:
    """A passage for a terminal, or with each expert's name before its tokens."""
    experts, _ = _chosen(passage)
    if colour:
        pairs = zip(passage["token_texts"], experts.tolist(), strict=True)
        body = "".join(paint(printable(text), expert) for text, expert in pairs)
        return f"\x1b[2m{printable(passage['prompt'])}\x1b[0m{body}"
    parts: list[str] = [passage["prompt"]]
    last = -1
    for text, expert in zip(passage["token_texts"], experts.tolist(), strict=True):
        if text and expert != last:
            parts.append(f"⟦{short(names[expert])}⟧")
            last = expert
        parts.append(text)
    return "".join(parts)


def shares(passage: Passage, names: Sequence[str]) -> dict[str, float]:
    """The fraction of the tokens that each expert colours."""
    experts, _ = _chosen(passage)
    count = np.bincount(experts, minlength=len(names)) / max(len(experts), 1)
    return {name: float(share) for name, share in zip(names, count, strict=True)}


def html_page(passages: Sequence[Passage], names: Sequence[str], *, title: str) -> str:
    """One HTML file that needs no other: passages with coloured tokens.

    The stronger the colour, the clearer the choice; pointing at a token shows every
    expert's weight and probability.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for passage in passages:
        counted = shares(passage, names)
        key = "".join(
            f'<span class="e{i % len(_HUES)}" style="--s:1">{html.escape(short(name))} '
            f"{100 * counted[name]:.0f} %</span>"
            for i, name in enumerate(names)
        )
        heading = " · ".join([passage["rule"], *filter(None, [passage.get("name")])])
        body.append(
            f"<section><h2>{html.escape(heading)}</h2>"
            f'<p class="key">{key} {html.escape(legend(passage["moves"]))}</p>'
            f'<pre><span class="prompt">{html.escape(printable(passage["prompt"]))}</span>'
            f"{''.join(_spans(passage, names))}</pre></section>"
        )
    hues = "\n".join(f".e{i} {{ --hue: {hue}; }}" for i, hue in enumerate(_HUES))
    return _PAGE.format(title=html.escape(title), hues=hues, body="\n".join(body))


def _chosen(passage: Passage) -> tuple[np.ndarray, np.ndarray]:
    return choices(
        passage["weights"], passage["expert_log_probs"], moves=passage["moves"]
    )


def _spans(passage: Passage, names: Sequence[str]) -> Iterator[str]:
    experts, strengths = _chosen(passage)
    rows = (passage[key] for key in ("weights", "expert_log_probs"))
    columns = (passage["token_texts"], passage["log_probs"], experts, strengths, *rows)
    for text, log_prob, expert, strength, weights, own in zip(*columns, strict=True):
        lines = [f"fused: {_percent(log_prob)}"]
        lines += [
            f"{short(name)}: weight {weight:.2f}, {_percent(value)}"
            for name, weight, value in zip(names, weights, own, strict=True)
        ]
        tip = html.escape("\n".join(lines), quote=True).replace("\n", "&#10;")
        yield (
            f'<span class="e{expert % len(_HUES)}" style="--s:{strength:.2f}" '
            f'title="{tip}">{html.escape(printable(text))}</span>'
        )


def _percent(log_prob: float | None) -> str:
    """JSON has no infinity: a token that an expert rules out is null there."""
    if log_prob is None or not math.isfinite(log_prob):
        return "0 %"
    return f"{100 * math.exp(log_prob):.3g} %"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 0.3rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7;
  font: 14px/1.7 ui-monospace, monospace; }}
pre span, .key span {{ border-radius: 3px; padding: 0.1em 0;
  background: color-mix(in srgb, var(--hue) calc(12% + 45% * var(--s)), transparent); }}
.key span {{ padding: 0.15em 0.5em; margin-right: 0.4em; }}
.key {{ font-size: 0.85rem; opacity: 0.9; margin: 0; }}
pre .prompt {{ opacity: 0.6; background: none; }}
{hues}
</style></head><body>
{body}
</body></html>
"""
