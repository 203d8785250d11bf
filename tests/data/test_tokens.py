"""Packed tokens: the layout, windows drawn in proportion, and the tokenizer's round trip."""

import json

import jax
import numpy as np
import pytest

from emfuse_jax.data.tokens import (
    SEPARATOR,
    pack_documents,
    sample_token_windows,
    token_streams,
    train_bpe,
)


def test_documents_lie_between_separators():
    stream = pack_documents([[3, 4], [], [5]], 0)
    np.testing.assert_array_equal(stream, [0, 3, 4, 0, 0, 5, 0])


def test_windows_are_pieces_of_their_streams():
    streams = token_streams([np.arange(100, 140), np.arange(200, 207)], window=7)
    draw = jax.jit(
        lambda key: sample_token_windows(key, streams, batch_size=4000, window=7)
    )
    windows = np.asarray(draw(jax.random.key(0)))
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    starts = windows[:, 0]
    # Every place of the long stream, its last one included; the short one has but one.
    long = starts[starts < 200]
    assert set(long) == set(range(100, 134))
    assert set(starts[starts >= 200]) == {200}
    spread = np.sqrt(4000 / 4)
    assert abs(len(long) - 2000) < 4 * spread
    assert abs(np.mean(long == 133) - 1 / 34) < 4 * np.sqrt(1 / 34 / len(long))


def test_shares_say_what_is_drawn():
    data = [np.zeros(9, int), np.ones(9, int), np.full(9, 2)]
    streams = token_streams(data, shares=[0.0, 1.0, 3.0], window=2)
    windows = sample_token_windows(
        jax.random.key(1), streams, batch_size=2000, window=2
    )
    count = np.bincount(np.asarray(windows[:, 0]), minlength=3)
    assert count[0] == 0
    assert abs(count[2] - 1500) < 4 * np.sqrt(2000 * 0.75 * 0.25)
    only = token_streams(data, shares=[1.0, 0.0, 0.0], window=2)
    assert jax.tree.map(np.shape, only) == jax.tree.map(np.shape, streams)


@pytest.mark.parametrize(
    ("shares", "window", "words"),
    [
        (None, 10, "domain 0 has 9 tokens, a window 10"),
        ([1.0], 2, "expected 2"),
        ([1.0, -1.0], 2, "not negative"),
        ([0.0, 0.0], 2, "not all zero"),
    ],
)
def test_streams_that_cannot_be_drawn_from(shares, window, words):
    with pytest.raises(ValueError, match=words):
        token_streams([np.zeros(9), np.zeros(50)], shares=shares, window=window)


def test_tokenizers_give_the_text_back():
    tokenizers = pytest.importorskip("tokenizers")
    texts = ["def f(x):\n    return x\n" * 20, "the return of the thing\n" * 20]
    odd = "  naïve \t 漢字 🙂\r\n\n\x07" + texts[0]
    sizes = {}
    for vocab_size in (257, 275):
        text = train_bpe(texts, vocab_size)
        tokenizer = tokenizers.Tokenizer.from_str(text)
        assert tokenizer.get_vocab_size() == vocab_size
        assert tokenizer.token_to_id(SEPARATOR) == 0
        ids = tokenizer.encode(odd, add_special_tokens=False).ids
        assert tokenizer.encode(odd).ids == [0, *ids]
        assert tokenizer.decode(ids) == odd
        sizes[vocab_size] = len(ids)
        assert train_bpe(texts, vocab_size) == text
        assert len(json.loads(text)["model"]["merges"]) == vocab_size - 257
    assert sizes[257] == len(odd.encode())
    assert sizes[275] < sizes[257] * 0.6
    with pytest.raises(ValueError, match="vocab_size=256; expected at least 257"):
        train_bpe(texts, 256)
