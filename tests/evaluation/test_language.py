import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _lm_models import TINY, random_params, random_tokens
from _standard_errors import assert_mean_close
from _table_lm import table_law, table_lm, table_params, table_scores
from emfuse_jax.evaluation.language import (
    bits_per_byte,
    document_interval,
    expert_divergence,
    next_token_log_probs,
    perplexity,
    sequence_log_prob,
    token_log_probs,
    watch_tokens,
)
from emfuse_jax.llm import language_model, logits
from emfuse_jax.llm.decode import generate, pad_left
from emfuse_jax.llm.emselect import emselect, pool_divergences
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.packllm import packllm_sim
from emfuse_jax.llm.rules import uniform

VOCAB = 6
MODEL = table_lm(VOCAB)
CONTEXTS = [[3], [1, 2, 3, 4, 5], [5, 5], [0, 4, 2, 2]]
TEXTS = [[1, 2, 0, 4, 3, 3, 5], [2], [0, 5, 5, 1], [4, 4, 4, 4, 1]]


def pad_right(rows, length=None):
    length = length or max(map(len, rows))
    tokens, valid = pad_left([row[::-1] for row in rows], length=length)
    return tokens[:, ::-1], valid[:, ::-1]


@pytest.fixture(scope="module")
def params():
    return table_params(jax.random.key(7), VOCAB)


@functools.cache
def compiled(model=MODEL, function=token_log_probs, **options):
    return jax.jit(lambda params, *arrays: function(params, model, *arrays, **options))


@pytest.mark.parametrize("block", [None, 1, 3])
def test_scores_are_those_of_the_law_token_by_token(params, block):
    texts = pad_right(TEXTS)
    scores = compiled(block=block)(params, *pad_left(CONTEXTS, length=9), *texts)
    for row, (context, text) in enumerate(zip(CONTEXTS, TEXTS, strict=True)):
        found = scores.log_probs[row]
        expected = table_scores(params, context, text)
        np.testing.assert_allclose(found[: len(text)], expected, rtol=1e-4)
        assert not found[len(text) :].any()
        whole = [*context, *text]
        best = [
            np.argmax(table_law(params, whole[:t])) == whole[t]
            for t in range(len(context), len(whole))
        ]
        assert scores.greedy[row].tolist() == best + [False] * (7 - len(text))
    # Both answers occur, or the test of `greedy` would be empty.
    assert 0 < int(scores.greedy.sum()) < sum(map(len, TEXTS))


def test_padding_and_company_change_nothing(params):
    together = compiled()(params, *pad_left(CONTEXTS, length=9), *pad_right(TEXTS))
    for row, text in enumerate(TEXTS):
        contexts = pad_left(CONTEXTS[row : row + 1], length=5)
        alone = compiled()(params, *contexts, *pad_right([text], length=8))
        np.testing.assert_allclose(
            alone.log_probs[0, :7], together.log_probs[row], rtol=1e-5
        )


def test_a_transformer_read_in_blocks_scores_as_in_one_pass_without_a_cache():
    params, tokens = random_params(TINY), random_tokens(3, (2, 14))
    context = pad_left([tokens[0, :5].tolist(), tokens[1, :3].tolist()])
    texts = [tokens[0, 5:].tolist(), tokens[1, 3:11].tolist()]
    scores = compiled(language_model(TINY), block=4)(
        params, *context, *pad_right(texts)
    )
    found = jax.jit(logits, static_argnums=0)(
        TINY, params, tokens, jnp.ones(tokens.shape, bool)
    )
    laws = jax.nn.log_softmax(found)
    for row, (start, text) in enumerate(zip((5, 3), texts, strict=True)):
        columns = laws[row, start - 1 : start - 1 + len(text)]
        expected = columns[jnp.arange(len(text)), jnp.array(text)]
        np.testing.assert_allclose(
            scores.log_probs[row, : len(text)], expected, rtol=1e-4, atol=1e-5
        )


def test_the_whole_law_holds_the_scores(params):
    contexts, texts = pad_left(CONTEXTS), pad_right(TEXTS)
    laws = compiled(function=next_token_log_probs)(params, *contexts, *texts)
    np.testing.assert_allclose(jnp.exp(laws).sum(-1), 1.0, rtol=1e-5)
    chosen = jnp.take_along_axis(laws, texts[0][..., None], axis=-1)[..., 0]
    scores = compiled()(params, *contexts, *texts).log_probs
    np.testing.assert_allclose(jnp.where(texts[1], chosen, 0.0), scores, rtol=1e-5)


def test_greedy_text_is_scored_as_greedy_all_along(params):
    @jax.jit
    def run(params, *contexts):
        key = jax.random.key(0)
        found = generate(params, key, MODEL, *contexts, 6, temperature=0.0)
        texts = (found.tokens, found.valid)
        return found, token_log_probs(params, MODEL, *contexts, *texts)

    found, scores = run(params, *pad_left(CONTEXTS))
    assert scores.greedy.all()
    np.testing.assert_allclose(scores.log_probs, found.log_probs, rtol=1e-5)


def test_text_may_fill_the_context_and_one_token_more(params):
    short = table_lm(VOCAB, context_length=6)
    context, text = pad_left([[1, 2, 3]], length=4), pad_right([[4, 5, 0, 1]])
    check = jax.jit(lambda *arrays: token_log_probs(params, short, *arrays))
    scores = check(*context, *text)
    read = []

    def extend(params, tokens, valid, cache):
        read.append(np.asarray(valid))
        return short.extend(params, tokens, valid, cache)

    token_log_probs(params, short._replace(extend=extend), *context, *text)
    assert read[0].astype(int).tolist() == [[1, 1, 1, 0]]
    expected = table_scores(params, [1, 2, 3], [4, 5, 0, 1])
    np.testing.assert_allclose(scores.log_probs[0], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="prompt 0 has 3 tokens and 4 more"):
        token_log_probs(params, short, *context, *pad_right([[4, 5, 0, 1, 2]]))


# Three symbols and four steps: 81 texts, every one of them scored.
STEPS = 4
PREFIX = [2, 0]
ALL_TEXTS = jnp.array(list(itertools.product(range(3), repeat=STEPS)))


@pytest.fixture(scope="module")
def experts():
    return [table_params(jax.random.key(i), 3, scale=0.8) for i in (11, 12, 13)]


def fusion(rule):
    return fuse_language_models([table_lm(3)] * 3, rule)


@functools.cache
def pool():
    return fusion(uniform())


@pytest.fixture(scope="module")
def own_laws(experts):
    """Of each expert alone, for every text: ``[model, text, step, symbol]``."""
    single = table_lm(3)
    return jnp.stack([laws_of(single, params) for params in experts])


def laws_of(model, params, texts=ALL_TEXTS):
    contexts = pad_left([PREFIX] * len(texts), length=3)
    every = jnp.ones(texts.shape, bool)
    return compiled(model, next_token_log_probs)(params, *contexts, texts, every)


def chosen_of(laws, texts=ALL_TEXTS):
    return jnp.take_along_axis(laws, texts[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize(
    "rule", [uniform(), emselect(), emselect(order="pool"), packllm_sim()]
)
def test_every_fusion_is_a_law_of_texts(experts, rule):
    laws = laws_of(fusion(rule), tuple(experts))
    np.testing.assert_allclose(jnp.exp(chosen_of(laws).sum(-1)).sum(), 1.0, rtol=1e-4)


def test_divergences_per_token_add_up_to_that_of_the_sequences(experts, own_laws):
    fused, own = laws_of(pool(), tuple(experts)), own_laws
    per_token = expert_divergence(fused, own)
    assert per_token.shape == (3, 81, STEPS)
    log_q, log_p = (
        np.asarray(x, np.float64).sum(-1)
        for x in (chosen_of(fused), jax.vmap(chosen_of)(own))
    )
    per_token, weight = np.asarray(per_token, np.float64), np.exp(log_q)
    sequence = (weight * (log_q - log_p)).sum(-1)
    total = (weight[:, None] * per_token).sum((1, 2))
    np.testing.assert_allclose(total, sequence, rtol=1e-3)
    assert (sequence > 0.05).all()
    # Over text of an expert's own the sums have another mean.
    elsewhere = (np.exp(log_p)[:, :, None] * per_token).sum((1, 2))
    assert (np.abs(elsewhere - sequence) > 0.01 * sequence).all()
    # Drawn from the fusion they estimate it.
    contexts = pad_left([PREFIX] * 3000, length=3)
    drawn = jax.jit(lambda p, k, *arrays: generate(p, k, pool(), *arrays, STEPS))(
        tuple(experts), jax.random.key(1), *contexts
    ).tokens
    index = np.asarray(drawn) @ 3 ** np.arange(STEPS)[::-1]
    assert_mean_close(per_token[0].sum(-1)[index], sequence[0])


def test_emselect_is_scored_by_the_expert_that_it_chooses_at_each_token(
    experts, own_laws
):
    laws = laws_of(fusion(emselect(order="pool")), tuple(experts))
    expert = jnp.argmin(pool_divergences(own_laws), axis=0)
    expected = jnp.take_along_axis(own_laws, expert[None, ..., None], axis=0)[0]
    np.testing.assert_allclose(laws, expected, rtol=1e-4)
    # The choice changes within texts, so no single expert scores them.
    assert (np.ptp(np.asarray(expert), axis=1) > 0).any()
    scores = chosen_of(laws).sum(-1)
    for own in own_laws:
        assert not np.allclose(scores, chosen_of(own).sum(-1), rtol=1e-3)


def test_weights_from_the_context_stay_whatever_follows(experts):
    context = [0, 2, 1, 1, 2]
    scores = np.array(
        [table_scores(p, context[:1], context[1:]).mean() for p in experts]
    )
    weights = np.exp(scores) / np.exp(scores).sum()
    texts = [[0, 1, 2, 2], [2, 1, 0, 0]]
    contexts = pad_left([context] * 2, length=8)
    laws = compiled(fusion(packllm_sim()), next_token_log_probs)(
        tuple(experts), *contexts, *pad_right(texts)
    )
    for row, text in enumerate(texts):
        for t in range(len(text)):
            prefix = context + text[:t]
            energy = sum(
                w * table_law(p, prefix) for w, p in zip(weights, experts, strict=True)
            )
            expected = energy - np.logaddexp.reduce(energy)
            np.testing.assert_allclose(laws[row, t], expected, rtol=1e-3)
    assert np.ptp(weights) > 0.05


def test_watching_a_text_tells_what_decoding_it_told(experts):
    contexts = pad_left([PREFIX, [1]], length=4)
    model, params = fusion(emselect()), tuple(experts)

    def keep(cache):
        return {"expert": jnp.argmax(cache.weights, 0), "laws": cache.log_probs}

    @jax.jit
    def run(params, *contexts):
        found = generate(params, jax.random.key(2), model, *contexts, 5, keep=keep)
        return found, watch_tokens(params, model, *contexts, found.tokens, keep)

    found, watched = run(params, *contexts)
    np.testing.assert_array_equal(watched["expert"], found.kept["expert"])
    np.testing.assert_allclose(watched["laws"], found.kept["laws"], rtol=1e-5)
    assert watched["laws"].shape == (5, 3, 2, 3)
    # One law per token, each before its token is seen.
    expected = table_law(experts[1], [*PREFIX, *found.tokens[0, :3].tolist()])
    np.testing.assert_allclose(watched["laws"][3, 1, 0], expected, rtol=1e-4)


def test_perplexity_is_exp_of_the_mean_negative_log_probability():
    log_probs = -jnp.array([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
    valid = jnp.array([[1, 1, 0], [1, 0, 0]], bool)
    assert float(perplexity(log_probs, valid)) == pytest.approx(np.exp(2.0))
    # Per token over all rows, not the mean of the rows' perplexities.
    assert np.mean([np.exp(1.5), np.exp(3.0)]) > np.exp(2.0) + 1
    np.testing.assert_allclose(sequence_log_prob(log_probs, valid), [-3.0, -3.0])
    even = jnp.full((2, 5), -jnp.log(50.0))
    assert float(perplexity(even, jnp.ones((2, 5), bool))) == pytest.approx(50.0)


def test_bits_per_byte_by_hand():
    # 8 bits and 24 bits over 4 + 8 bytes; the mean of 2 and 3 would be another number.
    log_prob = -jnp.log(2.0) * jnp.array([8.0, 24.0])
    found = bits_per_byte(log_prob, jnp.array([4, 8]))
    assert float(found) == pytest.approx(32 / 12)
    # An even law over the bytes costs 8 bits for each, however it is cut into tokens.
    assert float(bits_per_byte(-jnp.log(256.0) * 10, jnp.array(10))) == pytest.approx(8)


def test_an_expert_that_rules_a_token_out_is_infinitely_far():
    fused = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    experts = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
    found = expert_divergence(fused, experts)
    np.testing.assert_allclose(found, [0.5 * np.log(2), np.inf], rtol=1e-6)


def test_documents_are_drawn_with_all_that_belongs_to_them():
    key_size, key_score = jax.random.split(jax.random.key(3))
    size = jax.random.randint(key_size, (40,), 10, 1000)
    score = -(0.5 + jax.random.uniform(key_score, (40,))) * size
    interval = document_interval(jax.random.key(4), bits_per_byte, score, size)
    assert float(interval.low) < float(interval.estimate) < float(interval.high)
    np.testing.assert_allclose(interval.estimate, bits_per_byte(score, size))
    # Linearised: a ratio's variance is that of Σ (x - r·b) over (Σ b)².
    bits = np.asarray(-score / np.log(2.0), np.float64)
    total = float(np.sum(size))
    ratio = bits.sum() / total
    residual = bits - ratio * np.asarray(size)
    error = np.sqrt(40) * residual.std() / total
    width = float(interval.high - interval.low)
    assert width == pytest.approx(2 * 1.96 * error, rel=0.15)

    # A constant gap between two methods leaves no doubt about their difference.
    def difference(first, second, size):
        return bits_per_byte(first, size) - bits_per_byte(second, size)

    gap = document_interval(
        jax.random.key(5), difference, score - size * jnp.log(2.0), score, size
    )
    np.testing.assert_allclose([gap.low, gap.high], 1.0, rtol=1e-3)
    again = document_interval(jax.random.key(4), bits_per_byte, score, size)
    assert float(again.low) == float(interval.low)


def test_bad_input_is_named(params):
    texts = pad_right(TEXTS[:1])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        token_log_probs(params, MODEL, *pad_left([[]]), *texts)
    with pytest.raises(ValueError, match="continuation 0 holds token 6"):
        token_log_probs(params, MODEL, *pad_left([[1]]), *pad_right([[0, 6]]))
    with pytest.raises(ValueError, match="continuations are empty"):
        token_log_probs(params, MODEL, *pad_left([[1]]), *pad_left([[]], length=0))
    with pytest.raises(ValueError, match="same documents"):
        document_interval(jax.random.key(0), jnp.mean, jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(ValueError, match="two at least"):
        document_interval(jax.random.key(0), jnp.mean, jnp.zeros(1))
    with pytest.raises(ValueError, match="confidence=95"):
        document_interval(jax.random.key(0), jnp.mean, jnp.zeros(3), confidence=95.0)
