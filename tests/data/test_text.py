"""Text by domain: what is read, in which order, what is left out, what is held out."""

import gzip
import pathlib

import numpy as np
import pytest

from emfuse_jax.data.text import (
    Document,
    TextConfig,
    find_files,
    load_corpora,
    read_text,
    repeated_fraction,
    split_documents,
)
from emfuse_jax.data.text_sources import (
    TextSource,
    available_sources,
    default_sources,
    parse_sources,
)

CONFIG = TextConfig(min_file_bytes=10, held_out=0.25)


def lines(seed, count=30):
    """Lines of 40 letters that no other seed has."""
    letters = np.random.default_rng(seed).integers(97, 123, (count, 40))
    return ["".join(map(chr, row)) for row in letters]


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text) if isinstance(text, list) else text)
    return path


@pytest.fixture
def folder(tmp_path):
    """Forty files that have nothing in common."""
    for seed in range(40):
        write(tmp_path, f"text/{chr(97 + seed % 26)}{seed}.txt", lines(seed))
    return tmp_path / "text"


def source(path, **changes):
    return TextSource(name="own", patterns=(str(path),), **changes)


def names(documents):
    return {document.name for document in documents}


def test_every_file_is_on_one_side_and_none_is_lost(folder):
    (corpus,) = load_corpora([source(folder)], CONFIG)
    train, held_out = names(corpus.train), names(corpus.held_out)
    assert train | held_out == {f"text/{path.name}" for path in folder.iterdir()}
    assert not train & held_out
    assert len(held_out) == 10
    assert corpus.counts["train_documents"] == 30
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert corpus.counts["train_bytes"] + corpus.counts["held_out_bytes"] == size


def test_the_split_depends_on_names_alone(folder):
    (before,) = load_corpora([source(folder)], CONFIG)
    for path in folder.iterdir():
        path.write_text("changed\n" + path.read_text())
    (after,) = load_corpora([source(folder)], CONFIG)
    assert names(after.held_out) == names(before.held_out)
    # Nor on the order, and one document is held out of however few.
    documents = [Document(f"{i}", "") for i in range(5)]
    sides = split_documents(documents, 0.01)
    assert [len(side) for side in sides] == [4, 1]
    assert names(split_documents(documents[::-1], 0.01)[1]) == names(sides[1])


def test_copies_are_left_out_wherever_they_are(folder):
    copied = next(folder.iterdir())
    write(folder, "z-copy.txt", "\n" + copied.read_text() + "\n\n")
    most = copied.read_text().splitlines()[:-3] + lines(100, 3)
    write(folder, "z-near.txt", most)
    half = copied.read_text().splitlines()[:14] + lines(101, 16)
    write(folder, "z-half.txt", half)
    other = write(folder.parent, "other/copy.txt", copied.read_text())
    for seed in range(200, 210):
        write(other.parent, f"{seed}.txt", lines(seed))
    second = TextSource(name="other", patterns=(str(other.parent),))
    first, second = load_corpora([source(folder), second], CONFIG)
    assert first.counts["duplicates"] == second.counts["duplicates"] == 1
    assert first.counts["near_duplicates"] == 1
    read = names(first.train) | names(first.held_out)
    assert len(read & {f"text/{copied.name}", "text/z-copy.txt"}) == 1
    # At 14 of 30 lines a file is kept, for training at least.
    assert len(first.train) + len(first.held_out) + first.counts["leaked"] == 41


def test_held_out_text_was_never_trained_on(folder):
    """Half of each held-out file is planted in training files: all must go; of a file of
    which a tenth is planted none."""
    (clean,) = load_corpora([source(folder)], CONFIG)
    kept = TextConfig(min_file_bytes=10, held_out=0.25, max_repeated=1.0)
    half, tenth = clean.held_out[0], clean.held_out[1]
    victim = folder.parent / clean.train[0].name
    planted = half.text.splitlines()[:15] + tenth.text.splitlines()[:3]
    write(victim.parent, victim.name, victim.read_text().splitlines() + planted)
    (corpus,) = load_corpora([source(folder)], kept)
    assert corpus.counts["leaked"] == 1
    assert half.name not in names(corpus.held_out)
    assert tenth.name in names(corpus.held_out)
    trained = {line for d in corpus.train for line in d.text.splitlines()}
    shares = [repeated_fraction(d.text, trained) for d in corpus.held_out]
    assert max(shares) <= kept.max_leaked
    # The filter is what does it.
    loose = TextConfig(
        min_file_bytes=10, held_out=0.25, max_repeated=1.0, max_leaked=1.0
    )
    (leaky,) = load_corpora([source(folder)], loose)
    assert max(repeated_fraction(d.text, trained) for d in leaky.held_out) == 0.5


def test_short_lines_are_no_evidence():
    text = "int i;\n    return 0;\n}\n"
    assert repeated_fraction(text, set(text.splitlines())) == 0.0
    assert repeated_fraction("x" * 20 + "\n" + "y" * 20, {"x" * 20}) == 0.5


def test_large_families_are_read_last(tmp_path):
    for index in range(50):
        write(tmp_path, f"git-{index}.1", lines(index))
    for index, name in enumerate(("ls", "cat", "tar")):
        write(tmp_path, f"{name}.1", lines(100 + index))
    order = [name for name, _ in find_files(source(tmp_path))]
    assert len(order) == 53
    first = {name.split("/")[1].split(".")[0].split("-")[0] for name in order[:4]}
    assert first == {"ls", "cat", "tar", "git"}
    size = len("\n".join(lines(0)))
    config = TextConfig(
        min_file_bytes=10, max_file_bytes=5 * size, max_bytes=5 * size, held_out=0.25
    )
    (corpus,) = load_corpora([source(tmp_path)], config)
    # One family's members beyond the first wait until the budget is spent.
    assert corpus.counts["read"] == 5
    assert names(corpus.train) | names(corpus.held_out) == set(order[:5])


def test_compressed_and_long_files(tmp_path):
    text = "\n".join(lines(0)) + "\n"
    path = tmp_path / "page.1.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert read_text(path) == text
    assert read_text(path, max_bytes=100) == "\n".join(lines(0)[:2]) + "\n"
    assert read_text(write(tmp_path, "long", "é" * 50), max_bytes=31) == "é" * 15
    path.write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(ValueError, match=r"page\.1\.gz is not a whole gzip file"):
        read_text(path)
    path.write_bytes(text.encode())
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_text(path)
    # What is compressed to almost nothing is not unpacked to the end.
    path.write_bytes(gzip.compress(b"a" * 10_000_000))
    assert len(read_text(path, max_bytes=1000)) == 1000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"caf\xe9 au lait", ["byte 3", "0xe9", "not UTF-8", "iconv"]),
        ("café".encode()[:-1], ["byte 3", "0xc3", "unexpected end"]),
        ("text".encode("utf-16-le"), ["byte 1 is NUL", "iconv"]),
    ],
)
def test_files_that_are_not_utf8(folder, data, words):
    path = folder / "bad.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_corpora([source(folder)], CONFIG)
    for word in (str(path), *words):
        assert word in str(caught.value)
    # The machine's own files are nobody's fault.
    (corpus,) = load_corpora([source(folder, strict=False)], CONFIG)
    assert corpus.counts["not_utf8"] == 1
    assert corpus.counts["train_documents"] == 30


def test_domains_without_text(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_corpora([source(tmp_path / "*.txt", strict=False)])
    assert f"looked for:\n  {tmp_path}/*.txt" in str(caught.value)
    write(tmp_path, "one.txt", lines(0))
    with pytest.raises(
        ValueError, match=r"no train text \(files 1, read 1\).*split -C"
    ):
        load_corpora([source(tmp_path)], CONFIG)
    write(tmp_path, "two.txt", lines(0)[::-1])
    with pytest.raises(ValueError, match=r"no train text.*near_duplicates 1"):
        load_corpora([source(tmp_path)], CONFIG)
    with pytest.raises(ValueError, match="each named once"):
        load_corpora([source(tmp_path), source(tmp_path)], CONFIG)
    with pytest.raises(ValueError, match="at least one"):
        load_corpora([], CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_bytes": 10},
        {"min_file_bytes": 0},
        {"held_out": 1.0},
        {"held_out": 0.0},
        {"max_repeated": 1.5},
        {"max_leaked": -0.1},
    ],
)
def test_settings_that_mean_nothing(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TextConfig(**changes)


def test_domains_are_written_as_name_and_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    write(folder.parent, "odd[1]/x.txt", lines(1))
    own, python = parse_sources(["own=text", "python", "own=odd[1]"])
    assert (own.name, own.patterns, own.strict) == ("own", ("text", "odd[1]"), True)
    assert (python.name, python.strict) == ("python", False)
    assert len(find_files(own)) == 41
    (glob,) = parse_sources(["g=text/a*.txt"])
    assert {path.name[0] for _, path in find_files(glob)} == {"a"}
    (single,) = parse_sources([f"one={folder}/a0.txt"])
    assert find_files(single) == [("text/a0.txt", folder / "a0.txt")]
    with pytest.raises(FileNotFoundError, match="no file or folder texts"):
        parse_sources(["own=texts"])
    with pytest.raises(FileNotFoundError, match="as a glob it finds nothing"):
        parse_sources(["own=text/*.py"])
    with pytest.raises(ValueError, match=r"did you mean 'python'.*man.*name=path"):
        parse_sources(["pyton"])
    for wrong in ("=text", "own=", "a/b=text"):
        with pytest.raises(ValueError, match="written name=path"):
            parse_sources([wrong])


def test_what_python_ships_is_found_everywhere():
    python = default_sources()["python"]
    found = [name for name, _ in find_files(python)]
    assert any(name.endswith("asyncio/events.py") for name in found)
    assert not any("/site-packages/" in name or "/test/" in name for name in found)
    # NumPy's and Python's own headers, where the system has none.
    c = default_sources()["c"]
    assert any(name.endswith("ndarrayobject.h") for name, _ in find_files(c))
    sources = available_sources(2)
    assert len({source.name for source in sources}) == 2


def test_a_bare_machine_is_told_what_was_looked_for(monkeypatch, tmp_path):
    def bare():
        return {
            "man": source(tmp_path / "man1" / "*"),
            "c": source(tmp_path / "include/**/*.h"),
        }

    monkeypatch.setattr("emfuse_jax.data.text_sources.default_sources", bare)
    for index in range(3):
        write(tmp_path, f"include/{index}.h", lines(index))
    with pytest.raises(FileNotFoundError) as caught:
        available_sources(2, min_files=3)
    assert "2 domains were asked for and 1 found" in str(caught.value)
    assert f"own (0 files): {tmp_path}/man1/*" in str(caught.value)
    assert "name=path" in str(caught.value)
    assert pathlib.Path(available_sources(1, min_files=3)[0].patterns[0]).suffix == ".h"
