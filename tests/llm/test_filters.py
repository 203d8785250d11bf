import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _standard_errors import assert_mean_close
from emfuse_jax.llm.filters import (
    check_filters,
    filter_logits,
    min_p_filter,
    sample_token,
    top_k_filter,
    top_p_filter,
)

PROBS = np.array([0.10, 0.40, 0.05, 0.25, 0.20])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32)) + 3.0  # an offset is no matter


jitted = jax.jit(filter_logits, static_argnames="top_k")


def kept(logits):
    return np.isfinite(np.asarray(logits)).astype(int).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 3}, [0, 1, 0, 1, 1]),
        ({"top_k": 5}, [1, 1, 1, 1, 1]),
        ({"top_k": 99}, [1, 1, 1, 1, 1]),
        # 0.40 < 0.5 <= 0.40 + 0.25, and 0.65 < 0.7 <= 0.85.
        ({"top_p": 0.5}, [0, 1, 0, 1, 0]),
        ({"top_p": 0.7}, [0, 1, 0, 1, 1]),
        ({"top_p": 1e-6}, [0, 1, 0, 0, 0]),
        ({"top_p": 1.0}, [1, 1, 1, 1, 1]),
        # Relative to the likeliest: 0.3 · 0.40 = 0.12.
        ({"min_p": 0.3}, [0, 1, 0, 1, 1]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"min_p": 0.0}, [1, 1, 1, 1, 1]),
        # Of the two that top-k leaves, 0.40 / 0.65 = 0.615 is enough for 0.6 but not
        # for 0.62; of all five, 0.40 would be enough for neither.
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.62}, [0, 1, 0, 1, 0]),
        ({"top_p": 0.6}, [0, 1, 0, 1, 0]),
        # At temperature 1/2 probabilities are squared: 0.16 of 0.275 is enough for 0.5.
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.5, "min_p": 0.3}, [0, 1, 0, 1, 0]),
    ],
)
def test_filters_by_hand(options, expected):
    filtered = filter_logits(LOGITS, **options)
    assert kept(filtered) == expected
    temperature = options.get("temperature", 1.0)
    law = np.where(expected, PROBS ** (1 / temperature), 0.0)
    np.testing.assert_allclose(
        jax.nn.softmax(filtered), law / law.sum(), rtol=1e-5, atol=1e-7
    )


def test_filters_agree_with_a_sort_on_random_laws():
    logits = 3.0 * jax.random.normal(jax.random.key(0), (2, 20, 37))
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    for p in (0.05, 0.4, 0.9, 0.99):
        expected = np.zeros(probs.shape, bool)
        for row in np.ndindex(probs.shape[:-1]):
            mass = 0.0
            for token in np.argsort(-probs[row]):
                expected[row][token] = mass < p
                mass += probs[row][token]
        np.testing.assert_array_equal(np.isfinite(top_p_filter(logits, p)), expected)
        relative = probs >= p * probs.max(-1, keepdims=True)
        np.testing.assert_array_equal(np.isfinite(min_p_filter(logits, p)), relative)
    places = np.argsort(np.argsort(-probs, axis=-1), axis=-1)
    for k in (1, 5, 36):
        np.testing.assert_array_equal(np.isfinite(top_k_filter(logits, k)), places < k)


def test_tokens_of_equal_probability_share_their_fate():
    logits = jnp.log(jnp.array([0.2, 0.2, 0.4, 0.2]))
    for filtered in (top_k_filter(logits, 2), top_p_filter(logits, 0.5)):
        assert kept(filtered) == [1, 1, 1, 1]
    # So the order of the vocabulary has no say.
    order = jnp.array([2, 0, 3, 1])
    filtered = top_p_filter(logits[order], 0.35)
    assert kept(filtered) == kept(top_p_filter(logits, 0.35)[order]) == [1, 0, 0, 0]


def test_impossible_tokens_make_no_nan_and_are_never_drawn():
    logits = jnp.array([-jnp.inf, 1.0, -jnp.inf, 0.0])
    options = {"temperature": 0.7, "top_k": 3, "top_p": 0.999, "min_p": 0.01}
    filtered = jitted(logits, **options)
    assert kept(filtered) == [0, 1, 0, 1]
    nothing = jitted(jnp.full(4, -jnp.inf), **options)
    assert not np.isnan(nothing).any()
    rows = jnp.broadcast_to(logits, (500, 4))
    draw = jax.jit(lambda key, rows: sample_token(key, rows, **options))
    drawn = np.asarray(draw(jax.random.key(1), rows))
    assert set(drawn.tolist()) == {1, 3}
    nowhere = jnp.full((500, 4), -jnp.inf)
    assert not draw(jax.random.key(1), nowhere).any()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7, "min_p": 0.55}]
)
def test_tokens_are_drawn_as_often_as_the_filtered_law_says(options):
    rows = jnp.broadcast_to(LOGITS, (20_000, 5))
    draw = jax.jit(lambda key, rows: sample_token(key, rows, **options))
    drawn = draw(jax.random.key(2), rows)
    law = np.asarray(jax.nn.softmax(filter_logits(LOGITS, **options)), np.float64)
    frequencies = np.eye(5)[np.asarray(drawn)]
    error = assert_mean_close(frequencies, law, std=np.sqrt(law * (1 - law)))
    if options:
        # The unfiltered law would be seen through.
        assert (np.abs(law - PROBS) > 8 * error).any()


def test_greedy_is_the_argmax_and_the_first_of_several():
    logits = jax.random.normal(jax.random.key(3), (50, 9))
    greedy = sample_token(jax.random.key(4), logits, temperature=0.0)
    np.testing.assert_array_equal(greedy, np.argmax(logits, axis=-1))
    assert (
        int(sample_token(jax.random.key(4), jnp.array([0.0, 1, 1]), temperature=0)) == 1
    )
    # A low temperature comes to the same; a high one does not.
    draw = jax.jit(lambda key, t: sample_token(key, logits, temperature=t))
    np.testing.assert_array_equal(draw(jax.random.key(4), 1e-4), greedy)
    hot = draw(jax.random.key(4), 100.0)
    assert (np.asarray(hot) != np.asarray(greedy)).mean() > 0.5


def test_options_may_be_traced():
    def draw(temperature, top_p, min_p):
        return filter_logits(LOGITS, temperature=temperature, top_p=top_p, min_p=min_p)

    traced = jax.jit(draw)(0.5, 0.7, 0.1)
    np.testing.assert_allclose(traced, draw(0.5, 0.7, 0.1), rtol=1e-6)
    assert kept(jax.jit(draw)(1.0, 1.0, 0.0)) == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"min_p": -0.5}, r"min_p=-0\.5"),
        ({"min_p": 2}, "min_p=2"),
    ],
)
def test_options_outside_their_range_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        check_filters(**options)


def test_a_law_of_temperature_zero_is_refused():
    with pytest.raises(ValueError, match="argmax"):
        filter_logits(LOGITS, temperature=0)
