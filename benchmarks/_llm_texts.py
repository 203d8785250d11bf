"""What `llm_study` scores: windows of held-out documents, alone, mixed, and as questions.

Documents are parted into those on which choices are made and those that are reported; no
document is in both. A byte-level tokenizer's tokens have a fixed number of bytes each, so
that bits per byte are known for any stretch of tokens, characters cut or not.
"""

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from emfuse_jax.data.tokens import SEPARATOR
from experiments._lm import Window


class Texts(NamedTuple):
    """Texts of one length.

    ``tokens [text, time]``; ``domain [text, time]``, the number of the domain that each
    token is from; ``units`` name what a bootstrap draws, the documents.
    """

    tokens: np.ndarray
    domain: np.ndarray
    units: tuple[str, ...]


class Questions(NamedTuple):
    """Multiple choice. ``texts`` holds the options of one question after another, prompt
    and answer in one, the right one first."""

    texts: Texts
    num_options: int


def part_documents(
    windows: Sequence[Window], share: float
) -> tuple[list[Window], list[Window]]:
    """Windows for choices and windows to report, parted by document.

    Args:
        windows: of one domain.
        share: of the documents that choices are made on.

    Raises:
        ValueError: if there are fewer than two documents.
    """
    names = sorted({window.documents[0] for window in windows}, key=_digest)
    if len(names) < 2:
        raise ValueError(
            f"domain {windows[0].domains[0]!r} has windows of {len(names)} held-out "
            "document; choices and reported numbers need one each, so give more files"
        )
    count = min(max(round(share * len(names)), 1), len(names) - 1)
    chosen = set(names[:count])
    return (
        [window for window in windows if window.documents[0] in chosen],
        [window for window in windows if window.documents[0] not in chosen],
    )


def texts_of(windows: Sequence[Window], domain: int) -> Texts:
    """The windows of one domain."""
    tokens = np.asarray([window.tokens for window in windows], np.int32)
    units = tuple(window.documents[0] for window in windows)
    return Texts(tokens, np.full(tokens.shape, domain), units)


def mixed_texts(windows: Sequence[Sequence[Window]], segment: int, count: int) -> Texts:
    """Texts whose domain changes every ``segment`` tokens.

    A text takes one window of each domain and reads them in turns, ``A B C A`` for three:
    where a domain comes back its document goes on. All orders of the domains follow one
    another, and no window is used twice.

    Args:
        windows: by domain.
        segment: tokens, a divisor of a window's.
        count: texts, at most.

    Raises:
        ValueError: if the segments do not fill a window, or are too few to change.
    """
    length = len(windows[0][0].tokens)
    parts = length // segment
    if length % segment or parts < 2:
        raise ValueError(
            f"segment={segment} does not cut a window of {length} tokens into equal "
            f"parts, two at least; try {length // 4}"
        )
    orders = list(itertools.permutations(range(len(windows))))
    tokens, domain, units = [], [], []
    for index in range(min(count, *map(len, windows))):
        order = orders[index % len(orders)]
        rows = []
        for part in range(parts):
            own = order[part % len(order)]
            first = part // len(order) * segment
            rows += windows[own][index].tokens[first : first + segment]
        tokens.append(rows)
        domain.append(np.repeat([order[p % len(order)] for p in range(parts)], segment))
        units.append(" + ".join(own[index].documents[0] for own in windows))
    return Texts(np.asarray(tokens, np.int32), np.asarray(domain), tuple(units))


def questions(
    windows: Sequence[Window],
    pool: Sequence[Window],
    domain: int,
    *,
    prompt: int,
    answer: int,
    starts: Sequence[int] = (0,),
) -> Questions:
    """Which of several continuations, ``answer`` tokens each, is the prompt's own?

    Args:
        windows: whose questions are asked.
        pool: what their ``distractors`` number.
        domain: of all of them.
        prompt: tokens.
        answer: tokens.
        starts: where in a window a prompt begins, one question each.

    Raises:
        ValueError: if windows differ in the number of their distractors.
    """
    options = {len(window.distractors) for window in windows}
    if len(options) != 1:
        raise ValueError(
            f"windows with {sorted(options)} distractors; expected one count"
        )
    tokens, units = [], []
    for window, start in itertools.product(windows, starts):
        begin = start + prompt
        given = window.tokens[start:begin]
        others = [pool[index].tokens for index in window.distractors]
        answers = [own[begin : begin + answer] for own in (window.tokens, *others)]
        tokens += [given + own for own in answers]
        units.append(window.documents[0])
    rows = np.asarray(tokens, np.int32)
    asked = Texts(rows, np.full(rows.shape, domain), tuple(units))
    return Questions(asked, num_options=options.pop() + 1)


def token_bytes(tokenizer: Any) -> np.ndarray:
    """Bytes of each token ``[vocab]``; the separator has none.

    Byte-level tokenizers write each byte as one character.
    """
    vocabulary = tokenizer.vocab()
    return np.asarray([0 if t == SEPARATOR else len(t) for t in vocabulary])


def _digest(name: str) -> bytes:
    return hashlib.sha256(f"validation or test: {name}".encode()).digest()
