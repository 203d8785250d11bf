"""What language-model experiments share: prepared text, held-out windows, their scores."""

import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.artifacts.config import read_json, replace_file, to_json, write_json
from emfuse_jax.data.text import Corpus, Document
from emfuse_jax.data.tokens import SEPARATOR, pack_documents, train_bpe
from emfuse_jax.llm.tokenizer import ByteTokenizer, load_tokenizer
from experiments import _found, _names

BATCH = 32
"""Windows scored at a time."""


class Window(NamedTuple):
    """A held-out piece of text: a prompt, and what follows it.

    ``tokens`` are the window's in the run's own tokenizer, ``num_prompt`` of them the
    prompt's; tokens are what methods with one vocabulary score, ``prompt`` and
    ``continuation`` what others do. ``domains`` names the domain of each part and ``starts``
    its first token: one part, or two in a mixed window. ``distractors`` are the numbers
    of other windows of the file, whose continuations are the wrong answers of a
    multiple choice; mixed windows have none.
    """

    domains: tuple[str, ...]
    documents: tuple[str, ...]
    starts: tuple[int, ...]
    tokens: tuple[int, ...]
    num_prompt: int
    prompt: str
    continuation: str
    distractors: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of the continuation, which is what is scored."""
        return len(self.continuation.encode())


class Prepared(NamedTuple):
    """A run's text: tokens to train on, and what every method is scored on."""

    domains: tuple[str, ...]
    streams: tuple[np.ndarray, ...]
    windows: dict[str, list[Window]]
    counts: dict[str, dict[str, int]]
    window: int


def prepare_text(
    folder: pathlib.Path,
    corpora: Sequence[Corpus],
    *,
    vocab_size: int,
    window: int,
    prompt: int,
    num_windows: int,
) -> None:
    """Writes down what is trained on and what is scored, once for every method.

    The folder then holds ``tokenizer/``, ``tokens.npz`` (a stream per domain),
    ``held_out/<domain>.jsonl`` (whole documents), ``windows/<domain>.jsonl``,
    ``windows/mixed.jsonl`` and ``corpus.json``.

    Args:
        folder: a new one.
        corpora: the text, by domain.
        vocab_size: of the tokenizer; see `save_tokenizer`.
        window: tokens per held-out window.
        prompt: how many of them are given.
        num_windows: per domain, at most.

    Raises:
        ValueError: if no held-out document of a domain fills a window.
    """
    for name in ("tokenizer", "held_out", "windows"):
        (folder / name).mkdir(parents=True)
    texts = [document.text for corpus in corpora for document in corpus.train]
    save_tokenizer(folder / "tokenizer", texts, vocab_size)
    tokenizer = load_tokenizer(folder / "tokenizer")
    _write_streams(folder, corpora, tokenizer)
    _write_held_out(folder, corpora, tokenizer, (window, prompt, num_windows))
    counts = {corpus.name: corpus.counts for corpus in corpora}
    write_json(folder / "corpus.json", {"window": window, "counts": counts})


def read_prepared(folder: pathlib.Path) -> Prepared:
    """What `prepare_text` wrote.

    Raises:
        FileNotFoundError: if it is not all there.
        ValueError: if a file is damaged, or is not one of ours.
    """
    path = folder / "corpus.json"
    with _names.run(folder.parent):
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} holds no prepared text (no {path.name}); give the folder of a "
                "run of train_lm_experts that has got that far"
            )
    with _found.reading(path):
        corpus = read_json(path)
        domains, window = tuple(dict(corpus["counts"])), int(corpus["window"])
    found = _found.token_streams(folder / "tokens.npz")
    with _found.reading(folder / "tokens.npz"):
        streams = tuple(found[name].astype(np.int32) for name in domains)
    paths = sorted((folder / "windows").glob("*.jsonl"))
    windows = {path.stem: read_windows(path) for path in paths}
    order = [name for name in (*domains, "mixed") if name in windows]
    ordered = {name: windows[name] for name in order}
    return Prepared(domains, streams, ordered, corpus["counts"], window)


def save_tokenizer(folder: pathlib.Path, texts: Sequence[str], vocab_size: int) -> None:
    """Writes a tokenizer for some texts: a byte-level BPE, or plain bytes for a
    ``vocab_size`` of 257, which needs no package."""
    if vocab_size == ByteTokenizer.vocab_size:
        ByteTokenizer().save(folder)
        return
    replace_file(folder / "tokenizer.json", train_bpe(texts, vocab_size))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR)
    write_json(folder / "tokenizer_config.json", special)
    load_tokenizer(folder).save(folder)  # with what transformers wants to know


def read_windows(path: pathlib.Path) -> list[Window]:
    """Windows from a file of one JSON object per line.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it holds anything else than windows.
    """
    with _found.reading(path):
        return [_read_window(row) for row in _found.json_lines(path)]


def _read_window(row: dict[str, Any]) -> Window:
    """A window whose parts are what they should be; the errors are for `_found.reading`."""
    kinds = {"domains": str, "documents": str, "starts": int, "tokens": int}
    kinds |= {"distractors": int}
    tuples = {name: tuple(row[name]) for name in kinds}
    for name, kind in kinds.items():
        if not all(type(value) is kind for value in tuples[name]):
            raise TypeError(f"{name}={str(tuples[name])[:80]}")
    window = Window(**row | tuples)
    if type(window.num_prompt) is not int or not (
        0 < window.num_prompt < len(window.tokens)
    ):
        raise ValueError(f"num_prompt={window.num_prompt!r}")
    if not isinstance(window.prompt + window.continuation, str):
        raise TypeError(f"prompt={str(window.prompt)[:80]}")
    return window


def window_scores(
    loss_fn: Callable[[Any, jax.Array], jax.Array],
) -> Callable[[Any, Sequence[Window]], np.ndarray]:
    """Scores windows: ``(params, windows) -> nats [window]`` of their continuations.

    Args:
        loss_fn: ``(params, tokens [batch, time]) -> nats [batch, time-1]``; compiled once
            for every model and file of windows.
    """
    compiled = jax.jit(loss_fn)

    def score(params: Any, windows: Sequence[Window]) -> np.ndarray:
        tokens = np.asarray([window.tokens for window in windows], np.int32)
        rows = -(-len(tokens) // BATCH) * BATCH
        padded = np.resize(tokens, (rows, tokens.shape[1]))
        batches = padded.reshape(-1, BATCH, tokens.shape[1])
        losses = [np.asarray(compiled(params, jnp.asarray(b))) for b in batches]
        nats = np.concatenate(losses)[: len(windows)]
        return np.asarray(
            [
                row[window.num_prompt - 1 :].sum(dtype=np.float64)
                for row, window in zip(nats, windows, strict=True)
            ]
        )

    return score


def bits_per_byte(nats: np.ndarray, windows: Sequence[Window]) -> float:
    """All nats over all bytes, in bits."""
    size = sum(window.num_bytes for window in windows)
    return float(nats.sum() / np.log(2.0) / size)


def _write_streams(
    folder: pathlib.Path, corpora: Sequence[Corpus], tokenizer: Any
) -> None:
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    arrays = {
        corpus.name: pack_documents(
            [tokenizer.encode(document.text) for document in corpus.train],
            tokenizer.eos_id,
        ).astype(kind)
        for corpus in corpora
    }
    np.savez(folder / "tokens.npz", **arrays)


def _write_held_out(
    folder: pathlib.Path,
    corpora: Sequence[Corpus],
    tokenizer: Any,
    sizes: tuple[int, int, int],
) -> None:
    window, prompt, count = sizes
    single = {}
    for corpus in corpora:
        rows = [document._asdict() for document in corpus.held_out]
        _write_lines(folder / "held_out" / f"{corpus.name}.jsonl", rows)
        single[corpus.name] = _cut_windows(corpus, tokenizer, window, prompt)[:count]
        if not single[corpus.name]:
            raise ValueError(
                f"domain {corpus.name!r}: none of {len(corpus.held_out)} held-out "
                f"documents has {window} tokens; give longer ones, or a smaller window"
            )
    mixed = _mix(list(single.values()), tokenizer, prompt, count)
    written = {name: _with_distractors(windows) for name, windows in single.items()}
    for name, windows in (written | ({"mixed": mixed} if mixed else {})).items():
        rows = [window._asdict() for window in windows]
        _write_lines(folder / "windows" / f"{name}.jsonl", rows)


def _cut_windows(
    corpus: Corpus, tokenizer: Any, window: int, prompt: int
) -> list[Window]:
    """Every document's first window, then the second ones, and so on: many documents
    matter more than many windows. Windows do not overlap."""
    found: list[tuple[int, int, Window]] = []
    for number, document in enumerate(corpus.held_out):
        tokens = tokenizer.encode(document.text)
        for rank, start in enumerate(range(0, len(tokens) - window + 1, window)):
            piece = tokens[start : start + window]
            cut = _window((corpus.name,), (document,), (0,), piece, prompt, tokenizer)
            if cut is not None:
                found.append((rank, number, cut))
    return [cut for _, _, cut in sorted(found, key=lambda item: item[:2])]


def _mix(
    single: Sequence[Sequence[Window]], tokenizer: Any, prompt: int, count: int
) -> list[Window]:
    """Windows whose second half is of another domain than the first: every ordered pair
    of domains in turn. A document meets only one of each other domain, so that groups of
    documents stay independent of each other."""
    grouped = [_by_document(windows) for windows in single]
    groups = [group for group in zip(*grouped, strict=False) if len(group) > 1]
    mixed: list[Window] = []
    for rank in range(max((len(w) for group in groups for w in group), default=0)):
        for group in groups:
            present = [windows[rank] for windows in group if rank < len(windows)]
            for a, b in itertools.permutations(present, 2):
                half = len(a.tokens) // 2
                names = (Document(a.documents[0], ""), Document(b.documents[0], ""))
                domains, starts = (*a.domains, *b.domains), (0, half)
                tokens = [*a.tokens[:half], *b.tokens[half:]]
                cut = _window(domains, names, starts, tokens, prompt, tokenizer)
                mixed += [] if cut is None else [cut]
    return mixed[:count]


def _by_document(windows: Sequence[Window]) -> list[list[Window]]:
    groups: dict[str, list[Window]] = {}
    for window in windows:
        groups.setdefault(window.documents[0], []).append(window)
    return list(groups.values())


def _window(
    domains: tuple[str, ...],
    documents: tuple[Document, ...],
    starts: tuple[int, ...],
    tokens: Sequence[int],
    prompt: int,
    tokenizer: Any,
) -> Window | None:
    """None where the tokens' edges go through a character."""
    given, rest = tokenizer.decode(tokens[:prompt]), tokenizer.decode(tokens[prompt:])
    if "\ufffd" in given or "\ufffd" in rest:
        return None
    names = tuple(document.name for document in documents)
    return Window(domains, names, starts, tuple(tokens), prompt, given, rest)


def _with_distractors(windows: Sequence[Window], count: int = 3) -> list[Window]:
    """Wrong answers: the continuations of the windows at fixed distances, so that each
    is a right answer as often as a wrong one."""
    n = len(windows)
    steps = sorted({1 + k * max(1, (n - 1) // (count + 1)) for k in range(count)})
    return [
        w._replace(distractors=tuple((i + step) % n for step in steps if step < n))
        for i, w in enumerate(windows)
    ]


def _write_lines(path: pathlib.Path, rows: Sequence[Any]) -> None:
    lines = [json.dumps(to_json(row), ensure_ascii=False) for row in rows]
    replace_file(path, "".join(line + "\n" for line in lines))
