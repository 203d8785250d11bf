"""Text by domain: where it comes from, what is left out, what is held out.

A domain is the files of a `TextSource`: a person's own folders, or text that Python and
Debian ship (`default_sources`). Files are the unit of everything, so that no page is half
trained on and half scored:

1. Files are read in an order that depends on their names alone and in which large families
   (ten thousand pages of one program) come last; reading stops at the domain's budget.
2. Exact duplicates, and files most of whose lines were read before, are left out.
3. Whole files are held out, chosen by a hash of their names.
4. A held-out file is dropped if too many of its lines occur in the training text of any
   domain. Only lines of 20 characters or more count: short ones are shared by chance.

Without steps 2 and 4 a model is scored on what it has memorised: manual pages, headers and
licences repeat each other.

References:
    Lee, Ippolito, Nystrom, Zhang, Eck, Callison-Burch & Carlini, Deduplicating Training
    Data Makes Language Models Better, ACL 2022, https://arxiv.org/abs/2107.06499 (section
    4; there by suffix arrays and MinHash, here by whole lines).
"""

import dataclasses
import glob
import gzip
import hashlib
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from emfuse_jax.data.text_sources import TextSource

LINE_LENGTH = 20
"""Characters from which on a line is counted as evidence of copying."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What of the text is used.

    Attributes:
        max_bytes: per domain, training and held-out text together.
        max_file_bytes: the rest of a longer file is not read.
        min_file_bytes: shorter files are left out.
        held_out: fraction of the files.
        max_repeated: files of whose long lines more than this fraction were read before
            are left out.
        max_leaked: held-out files of whose long lines more than this fraction occur in
            the training text are dropped.
    """

    max_bytes: int = 4_000_000
    max_file_bytes: int = 50_000
    min_file_bytes: int = 200
    held_out: float = 0.15
    max_repeated: float = 0.5
    max_leaked: float = 0.3

    def __post_init__(self) -> None:
        if not 1 <= self.min_file_bytes <= self.max_file_bytes <= self.max_bytes:
            raise ValueError(
                f"min_file_bytes={self.min_file_bytes}, max_file_bytes="
                f"{self.max_file_bytes} and max_bytes={self.max_bytes} must be positive "
                "and in this order"
            )
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out={self.held_out} must be in (0, 1)")
        for name in ("max_repeated", "max_leaked"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")


class Document(NamedTuple):
    """One file; ``name`` is its path below the folder that was asked for."""

    name: str
    text: str


class Corpus(NamedTuple):
    """One domain's text. ``counts`` says what became of the files."""

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    counts: dict[str, int]


def load_corpora(
    sources: Sequence[TextSource], config: TextConfig | None = None
) -> list[Corpus]:
    """Reads, de-duplicates and splits the text of several domains.

    Args:
        sources: one per domain; what an earlier one has is a duplicate in a later one.
        config: budgets and thresholds.

    Returns:
        One corpus per source, in their order.

    Raises:
        FileNotFoundError: if a source has no files; the text lists where it looked.
        ValueError: if a file is not UTF-8 (the text names file and byte), a name is
            given twice, or nothing remains of a domain's training or held-out text.

    Example:
        >>> import tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for i in range(10):
        ...     _ = (folder / f"{i}.txt").write_text(f"page {i}, line {i}\\n" * 30)
        >>> (corpus,) = load_corpora([TextSource(name="mine", patterns=(str(folder),))])
        >>> len(corpus.train), len(corpus.held_out)
        (8, 2)
    """
    config = config or TextConfig()
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"domains {', '.join(names) or '(none)'}; expected at least one, each named "
            "once"
        )
    seen: set[str] = set()
    hashes: set[bytes] = set()
    corpora = [_read_domain(source, config, seen, hashes) for source in sources]
    trained: set[str] = set()
    for corpus in corpora:
        for document in corpus.train:
            trained |= _long_lines(document.text)
    return [_without_leaks(corpus, trained, config) for corpus in corpora]


def find_files(source: TextSource) -> list[tuple[str, pathlib.Path]]:
    """Names and paths of a source's files, in the order in which they are read.

    A family is the files of one folder whose names begin with the same word. The order
    takes every family's first file, then the second ones, and so on.

    Raises:
        FileNotFoundError: if there are none.

    Example:
        >>> import tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp()) / "notes"
        >>> folder.mkdir()
        >>> _ = (folder / "a.txt").write_text("one"), (folder / "b.md").write_text("two")
        >>> found = find_files(TextSource(name="mine", patterns=(f"{folder}/*.txt",)))
        >>> [name for name, _ in found]
        ['notes/a.txt']
    """
    found: dict[pathlib.Path, str] = {}
    for pattern in source.patterns:
        root, paths = _glob(pattern)
        for path in paths:
            name = f"{root.name}/{path.relative_to(root)}"
            name = os.fsencode(name).decode("utf-8", "replace")
            if not source.excludes(name):
                found.setdefault(path, name)
    if not found:
        looked = "\n  ".join(source.patterns)
        raise FileNotFoundError(
            f"domain {source.name!r} has no files; looked for:\n  {looked}\n"
            "Give other files with name=path"
        )
    families: dict[tuple[pathlib.Path, str], list[tuple[str, pathlib.Path]]] = {}
    for path, name in sorted(found.items(), key=lambda item: _digest(item[1])):
        word = re.match(r"[A-Za-z]+|[^A-Za-z]*", path.name)
        key = (path.parent, word.group() if word else "")
        families.setdefault(key, []).append((name, path))
    ranked = [
        (rank, _digest(name), name, path)
        for family in families.values()
        for rank, (name, path) in enumerate(family)
    ]
    return [(name, path) for _, _, name, path in sorted(ranked)]


def read_text(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> str:
    """Reads a UTF-8 file, also a gzipped one.

    Args:
        path: the file; a name that ends in ``.gz`` is decompressed.
        max_bytes: of a longer file only the whole lines up to here are read (characters,
            where the first line is longer).

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not UTF-8 text or the compressed data are damaged; the text
            names the file and the byte.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_text("one\\ntwo\\nthree\\n")
        >>> read_text(path, max_bytes=9).split()  # whole lines
        ['one', 'two']
    """
    return _read_start(path, max_bytes)[0]


def repeated_fraction(text: str, seen: set[str]) -> float:
    """The fraction of a text's distinct long lines that are in ``seen``; 0 if it has none.

    Example:
        >>> seen = {"a line of twenty characters"}
        >>> repeated_fraction("a line of twenty characters\\nx = 1\\n", seen)
        1.0
    """
    lines = _long_lines(text)
    return len(lines & seen) / len(lines) if lines else 0.0


def split_documents(
    documents: Sequence[Document], held_out: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Training and held-out documents, chosen by a hash of their names alone.

    Args:
        documents: in any order, which is kept.
        held_out: the fraction held out, rounded, at least one document.

    Example:
        >>> documents = [Document(f"{i}.txt", "…") for i in range(10)]
        >>> train, held_out = split_documents(documents, 0.2)
        >>> len(train), len(held_out)
        (8, 2)
    """
    order = sorted(documents, key=lambda document: _digest(f"side of {document.name}"))
    count = max(1, round(held_out * len(order)))
    names = {document.name for document in order[:count]}
    return (
        tuple(document for document in documents if document.name not in names),
        tuple(document for document in documents if document.name in names),
    )


def _read_domain(
    source: TextSource, config: TextConfig, seen: set[str], hashes: set[bytes]
) -> Corpus:
    files = find_files(source)
    keys = (
        "files",
        "read",
        "not_utf8",
        "short",
        "cut",
        "duplicates",
        "near_duplicates",
    )
    counts: dict[str, int] = dict.fromkeys(keys, 0)
    counts["files"] = len(files)
    kept: list[Document] = []
    budget = config.max_bytes
    for document, is_cut in _read_files(files, source, config, counts):
        digest = _digest(document.text.strip())
        if digest in hashes:
            counts["duplicates"] += 1
            continue
        hashes.add(digest)
        if repeated_fraction(document.text, seen) > config.max_repeated:
            counts["near_duplicates"] += 1
            continue
        seen |= _long_lines(document.text)
        counts["cut"] += is_cut
        kept.append(document)
        budget -= len(document.text.encode())
        if budget <= 0:
            break
    train, held_out = split_documents(kept, config.held_out)
    return Corpus(source.name, train, held_out, counts)


def _read_files(
    files: Sequence[tuple[str, pathlib.Path]],
    source: TextSource,
    config: TextConfig,
    counts: dict[str, int],
) -> Iterator[tuple[Document, bool]]:
    """Documents that are long enough, and whether each was cut."""
    for name, path in files:
        counts["read"] += 1
        try:
            text, is_cut = _read_start(path, config.max_file_bytes)
        except (ValueError, OSError):
            if source.strict:
                raise
            counts["not_utf8"] += 1
            continue
        if len(text.encode()) < config.min_file_bytes or not text.strip():
            counts["short"] += 1
            continue
        yield Document(name, text), is_cut


def _without_leaks(corpus: Corpus, trained: set[str], config: TextConfig) -> Corpus:
    held_out = tuple(
        document
        for document in corpus.held_out
        if repeated_fraction(document.text, trained) <= config.max_leaked
    )
    counts = corpus.counts | {"leaked": len(corpus.held_out) - len(held_out)}
    for side, documents in (("train", corpus.train), ("held_out", held_out)):
        counts[f"{side}_documents"] = len(documents)
        counts[f"{side}_bytes"] = sum(len(d.text.encode()) for d in documents)
        if not documents:
            told = ", ".join(f"{key} {value}" for key, value in counts.items() if value)
            raise ValueError(
                f"domain {corpus.name!r} has no {side.replace('_', '-')} text ({told}); "
                "files are held out whole, so give more of them (split -C 40K cuts a "
                "long one), or allow more with held_out and max_leaked"
            )
    return corpus._replace(held_out=held_out, counts=counts)


def _glob(pattern: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The folder that names are relative to, and the files found below it."""
    pattern = os.path.expanduser(pattern)
    root = pathlib.Path(pattern)
    if root.is_file():
        return root.parent, [root]
    if root.is_dir():
        pattern = os.path.join(glob.escape(pattern), "**", "*")
    while glob.has_magic(str(root)) and not root.exists():
        root = root.parent
    found = (pathlib.Path(path) for path in glob.iglob(pattern, recursive=True))
    return root, [path for path in found if path.is_file()]


def _read_start(
    path: str | os.PathLike[str], max_bytes: int | None
) -> tuple[str, bool]:
    """The file's text, and whether it was cut."""
    path = pathlib.Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            data = file.read(-1 if max_bytes is None else max_bytes + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a whole gzip file ({error}); copy it again, or unpack it"
        ) from error
    is_cut = max_bytes is not None and len(data) > max_bytes
    text = _decode(data[:max_bytes], path, is_cut)
    last_line = text.rfind("\n") + 1
    return (text[:last_line] if is_cut and last_line else text), is_cut


def _decode(data: bytes, path: pathlib.Path, is_cut: bool) -> str:
    zero = data.find(b"\0")
    if zero >= 0:
        raise ValueError(
            f"{path}: byte {zero} is NUL, so this is no UTF-8 text; leave the file out, "
            "or convert it (iconv -t UTF-8)"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        # The cut may have gone through a character.
        if is_cut and error.end == len(data) and len(data) - error.start < 4:
            return data[: error.start].decode("utf-8")
        raise ValueError(
            f"{path}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8 "
            f"({error.reason}); convert the file (iconv -f LATIN1 -t UTF-8) or leave it "
            "out"
        ) from error


def _long_lines(text: str) -> set[str]:
    lines = (line.strip() for line in text.splitlines())
    return {line for line in lines if len(line) >= LINE_LENGTH}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
