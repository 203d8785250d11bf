import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from _table_lm import scripted_params, table_lm, table_params
from emfuse_jax.llm.decode import Generation, generate, pad_left
from emfuse_jax.llm.stream import (
    compile_decoder,
    complete,
    settled_text,
    stream_chunks,
    stream_text,
)

PIECES = ["a", "b", "ab", "c", "\n", "<end>"]
"""The text of each token of the small vocabulary; 5 is its stop token."""
MODEL = table_lm(len(PIECES))
BYTES = table_lm(256)
KEY = jax.random.key(0)


def text_of(tokens):
    return "".join(PIECES[token] for token in tokens)


def bytes_of(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


@functools.cache
def greedy(chunk=3, model=MODEL, **options):
    return compile_decoder(model, chunk=chunk, temperature=0.0, **options)


def scripted(script, *, start=2):
    return scripted_params(script, len(PIECES), start=start)


def pieces_of(decoder, params, prompt, new_tokens, detokenize=text_of, **options):
    return list(
        stream_text(params, KEY, decoder, detokenize, prompt, new_tokens, **options)
    )


def tokens_of(pieces):
    return [token for piece in pieces for token in piece.tokens]


def log_probs_of(pieces):
    return [log_prob for piece in pieces for log_prob in piece.log_probs]


@functools.cache
def one_generation():
    """Of seven tokens, sampled, and the params and prompt that it is of."""
    params, prompt = table_params(jax.random.key(5), len(PIECES)), [1, 0, 3]
    found = jax.jit(lambda p, *arrays: generate(p, KEY, MODEL, *arrays, 7))(
        params, *pad_left([prompt])
    )
    return params, prompt, found


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_stream_is_one_generation_whatever_its_chunks(chunk):
    params, prompt, whole = one_generation()
    pieces = pieces_of(compile_decoder(MODEL, chunk=chunk), params, prompt, 7)
    tokens = tokens_of(pieces)
    assert tokens == whole.tokens[0].tolist()
    np.testing.assert_array_equal(np.float32(log_probs_of(pieces)), whole.log_probs[0])
    assert "".join(piece.text for piece in pieces) == text_of(tokens)
    assert [piece.finish for piece in pieces][-1] == "length"
    assert all(piece.finish is None for piece in pieces[:-1])
    assert len(pieces) == -(-7 // chunk)


def test_a_batch_completes_as_its_streams():
    params = table_params(jax.random.key(6), len(PIECES))
    decoder = greedy(stop_tokens=(5,))
    prompts = [[1], [3, 3, 0], [2, 4]]
    together = complete(
        params, KEY, decoder, text_of, prompts, 20, stop_strings=["\n\n"]
    )
    for prompt, completion in zip(prompts, together, strict=True):
        pieces = pieces_of(decoder, params, prompt, 20, stop_strings=["\n\n"])
        assert "".join(piece.text for piece in pieces) == completion.text
        assert tokens_of(pieces) == completion.tokens
        np.testing.assert_allclose(log_probs_of(pieces), completion.log_probs)
        assert pieces[-1].finish == completion.finish


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_stop_string_is_found_across_tokens(chunk):
    # "a" "ab" "c" "\n" "b" "a" "c": "bc\n" begins inside of one token and ends in a third.
    params = scripted([0, 2, 3, 4, 1, 0, 3])
    decoder = greedy(chunk)
    pieces = pieces_of(decoder, params, [0, 0], 7, stop_strings=["xx", "bc\n"])
    shown = "".join(piece.text for piece in pieces)
    assert shown == "aa"
    # No part of it was ever shown, and the tokens end with the one that completes it.
    assert tokens_of(pieces) == [0, 2, 3, 4]
    assert len(pieces[-1].log_probs) == len(pieces[-1].tokens)
    assert pieces[-1].finish == "stop_string"
    (completion,) = complete(
        params, KEY, decoder, text_of, [[0, 0]], 7, stop_strings=["bc\n"]
    )
    assert completion[:2] == ("aa", [0, 2, 3, 4])
    # What only looked like it is shown in the end.
    pieces = pieces_of(decoder, params, [0, 0], 7, stop_strings=["bc\nx", "acx"])
    assert "".join(piece.text for piece in pieces) == "aabc\nbac"


def test_text_that_may_become_a_stop_string_is_held_back():
    params = scripted([0, 1, 3, 0])
    pieces = pieces_of(greedy(1), params, [0, 0], 4, stop_strings=["bcb"])
    assert [piece.text for piece in pieces] == ["a", "", "", "bca"]


def test_characters_are_shown_when_all_their_bytes_are_there():
    script = list("né 1€ 😀!".encode())
    params = scripted_params(script, 256, start=1)
    pieces = pieces_of(greedy(1, BYTES), params, [0], len(script), detokenize=bytes_of)
    texts = [piece.text for piece in pieces]
    assert [text for text in texts if text] == ["n", "é", " ", "1", "€", " ", "😀", "!"]
    assert len(texts) == len(script)
    # A character cut off by the end is shown for what it is.
    pieces = pieces_of(greedy(1, BYTES), params, [0], 2, detokenize=bytes_of)
    assert [piece.text for piece in pieces] == ["n", "\ufffd"]


def test_a_stop_token_ends_the_text_and_is_not_in_it():
    params = scripted([0, 1, 5, 3, 3])
    decoder = greedy(2, stop_tokens=(5,))
    pieces = pieces_of(decoder, params, [0, 0], 5)
    assert [piece.text for piece in pieces] == ["ab", ""]
    assert tokens_of(pieces) == [0, 1, 5]
    assert pieces[-1].finish == "stop_token"
    # Its text may be a stop string as well without being taken for one.
    (completion,) = complete(
        params, KEY, decoder, text_of, [[0, 0]], 5, stop_strings=["<end>"]
    )
    assert completion.finish == "stop_token"
    assert completion.text == "ab"


def test_a_batch_ends_when_its_last_row_does():
    params = scripted([0, 1, 5, 3, 3, 5, 0, 0])
    decoder = greedy(2, stop_tokens=(5,))
    prompts = [[0, 0], [0, 0, 0, 0, 0]]
    chunks = list(stream_chunks(params, KEY, decoder, prompts, 8))
    assert all(isinstance(chunk, Generation) for chunk in chunks)
    assert len(chunks) == 2  # of four
    done = complete(params, KEY, decoder, text_of, prompts, 8)
    assert [row.text for row in done] == ["ab", "cc"]
    assert [row.finish for row in done] == ["stop_token"] * 2
    by_string = complete(
        params, KEY, greedy(2), text_of, [[0, 0]], 8, stop_strings=["b"]
    )
    assert by_string[0][:2] == ("a", [0, 1])


def test_kept_belongs_to_the_tokens_of_its_piece():
    params = scripted([0, 1, 3, 0, 1])
    decoder = greedy(2, keep=lambda cache: cache.count)
    pieces = pieces_of(decoder, params, [0, 0], 5, stop_strings=["ca"])
    assert [piece.kept[:, 0].tolist() for piece in pieces] == [[2, 3], [4, 5]]
    assert [piece.tokens for piece in pieces] == [[0, 1], [3, 0]]
    pieces = pieces_of(decoder, params, [0, 0], 3)
    assert [len(piece.kept) for piece in pieces] == [2, 1]


def test_one_program_per_bucket_of_prompts():
    traces = {}
    model = table_lm(len(PIECES), traces=traces)
    decoder = compile_decoder(model, chunk=4)
    params = table_params(jax.random.key(5), len(PIECES))
    for prompt, new_tokens in (([1], 8), ([2] * 16, 8), ([1, 2], 7), ([3], 5)):
        list(stream_chunks(params, KEY, decoder, [prompt], new_tokens))
    assert traces == {"prefill": 1, "step": 1}
    list(stream_chunks(params, KEY, decoder, [[1] * 17], 8))
    assert traces == {"prefill": 2, "step": 2}
    list(stream_chunks(params, KEY, decoder, [[1] * 17, [1]], 8))
    assert traces == {"prefill": 3, "step": 3}


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=3)))
def test_settled_text_is_never_taken_back(text, stops):
    final, _ = settled_text(text, stops, final=True)
    shown = ""
    for size in range(len(text) + 1):
        settled, ended = settled_text(text[:size], stops)
        assert settled.startswith(shown)
        shown = settled
        if ended:
            break
    assert final.startswith(shown)
    assert not any(stop in final for stop in stops)
    # Only what may still become a stop string is held back.
    held = final[len(shown) :]
    assert not held or any(stop.startswith(held) for stop in stops)


def test_bad_input_is_named():
    params = scripted([0])
    with pytest.raises(ValueError, match="chunk=0"):
        compile_decoder(MODEL, chunk=0)
    with pytest.raises(ValueError, match="stop string is empty"):
        pieces_of(greedy(), params, [0], 4, stop_strings=["a", ""])
    with pytest.raises(ValueError, match=r"expected a sequence, as \['ab'\]"):
        pieces_of(greedy(), params, [0], 4, stop_strings="ab")
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        pieces_of(greedy(), params, [], 4)
    with pytest.raises(ValueError, match="prompt 0 has 70 tokens and 4 more"):
        pieces_of(greedy(), params, [0] * 70, 4)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        pieces_of(greedy(), params, [0], 0)
    with pytest.raises(ValueError, match="no prompt"):
        complete(params, KEY, greedy(), text_of, [], 4)
