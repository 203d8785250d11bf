import jax
import numpy as np
import pytest

from _table_lm import table_lm, table_params, table_scores
from emfuse_jax.evaluation.scoring import (
    compile_scorer,
    rolling_windows,
    score_continuations,
)

VOCAB = 5


@pytest.fixture(scope="module")
def params():
    return table_params(jax.random.key(1), VOCAB)


def draw_requests(sizes, seed=0):
    random = np.random.default_rng(seed)
    return [
        tuple(random.integers(0, VOCAB, size).tolist() for size in pair)
        for pair in sizes
    ]


def test_scores_come_back_in_order_whatever_their_lengths(params):
    scorer = compile_scorer(table_lm(VOCAB), block=4)
    sizes = [(1, 1), (20, 3), (3, 9), (2, 2), (16, 8), (17, 8), (5, 16), (1, 4)]
    requests = draw_requests(sizes)
    batches = []
    scores = score_continuations(
        params, scorer, requests, batch_size=3, on_batch=batches.append
    )
    for (context, text), score in zip(requests, scores, strict=True):
        expected = table_scores(params, context, text)
        np.testing.assert_allclose(score.log_probs, expected, rtol=1e-4)
        assert score.greedy.shape == (len(text),)
    assert sum(batches) == len(requests)
    assert score_continuations(params, scorer, []) == []


def test_one_program_per_bucket(params):
    traces = {}
    scorer = compile_scorer(table_lm(VOCAB, traces=traces))
    # Five batches of one bucket, the last of them not full.
    requests = draw_requests([(1 + i % 16, 1 + i % 8) for i in range(17)])
    score_continuations(params, scorer, requests, batch_size=4)
    assert traces == {"prefill": 1, "extend": 1}
    score_continuations(params, scorer, draw_requests([(4, 4)]), batch_size=4)
    assert traces == {"prefill": 1, "extend": 1}
    score_continuations(params, scorer, draw_requests([(4, 9)]), batch_size=4)
    assert traces == {"prefill": 2, "extend": 2}


def test_windows_score_every_token_once_with_what_context_there_is():
    assert rolling_windows(range(10), -1, 4) == [
        ([-1], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert rolling_windows([7, 8], -1, 4) == [([-1], [7, 8])]
    assert rolling_windows([], -1, 4) == []
    for length in (1, 2, 5, 7, 30):
        windows = rolling_windows(range(23), -1, length)
        assert [t for _, text in windows for t in text] == list(range(23))
        assert all(len(c) + len(text) <= length + 1 for c, text in windows)
        for context, text in windows:
            whole = [*context, *text]
            assert whole == list(range(whole[-1] - len(whole) + 1, whole[-1] + 1))


def test_a_text_longer_than_the_context_is_scored_in_windows(params):
    scorer = compile_scorer(table_lm(VOCAB, context_length=8))
    (text,) = draw_requests([(30,)])[0]
    windows = rolling_windows(text, 0, 8)
    scores = score_continuations(params, scorer, windows, batch_size=2)
    expected = sum(table_scores(params, *window).sum() for window in windows)
    total = sum(score.log_probs.sum() for score in scores)
    assert total == pytest.approx(expected, rel=1e-4)


def test_bad_requests_are_named(params):
    scorer = compile_scorer(table_lm(VOCAB, context_length=8))

    def score(*requests):
        return score_continuations(params, scorer, requests)

    with pytest.raises(ValueError, match="request 1 has an empty context"):
        score(([1], [2]), ([], [2]))
    with pytest.raises(ValueError, match="request 0 has an empty continuation"):
        score(([1], []))
    with pytest.raises(ValueError, match=r"request 0 has 5 \+ 5 tokens, .* takes 9"):
        score(([1] * 5, [1] * 5))
    with pytest.raises(ValueError, match=r"request 0 holds token 5, .* 0 … 4"):
        score(([1], [5]))
    with pytest.raises(ValueError, match="length=0"):
        rolling_windows([1], 0, 0)
