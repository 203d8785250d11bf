"""EMSelect: the two forms of its rule, its orders, and what choosing costs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from emfuse_jax.energy import log_opinion_pool
from emfuse_jax.llm.emselect import (
    emselect,
    nearest_to_pool,
    pairwise_kl,
    pairwise_margin,
    pool_divergences,
    selection_gap,
    sequence_gap,
    tournament,
)
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.rules import uniform
from llm._table_model import table_model, table_params

LAWS = jnp.asarray(
    scipy.special.log_softmax(
        np.random.default_rng(0).normal(size=(3, 200, 6)) * 1.5, -1
    ),
    jnp.float32,
)
play = jax.jit(tournament, static_argnames="alpha")
nearest = jax.jit(nearest_to_pool)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_the_rule_by_divergence_is_the_rule_by_expected_log_likelihood(alpha):
    first, second = np.asarray(LAWS[0], np.float64), np.asarray(LAWS[1], np.float64)
    pool = scipy.special.softmax(alpha * first + (1 - alpha) * second, axis=-1)
    margin = (pool * first).sum(-1) - (pool * second).sum(-1)
    found = pairwise_margin(LAWS[0], LAWS[1], alpha=alpha)
    np.testing.assert_allclose(found, margin, atol=1e-5)
    to_first, to_second = pairwise_kl(LAWS[0], LAWS[1], alpha=alpha)
    np.testing.assert_allclose(to_second - to_first, margin, atol=1e-5)
    by_hand = (pool * (np.log(pool) - first)).sum(-1)
    np.testing.assert_allclose(to_first, by_hand, atol=1e-5)
    clear = np.abs(margin) > 1e-4
    chosen = play(LAWS[:2], alpha=alpha)
    np.testing.assert_array_equal(chosen[clear], (margin < 0)[clear])
    # At one half either may win; elsewhere the expert of the larger share (almost) does.
    if alpha == 0.5:
        assert 0.3 < np.mean(chosen) < 0.7
    else:
        assert np.mean(chosen == (alpha < 0.5)) > 0.95


def test_the_pair_that_differs_by_sharpness_is_won_by_the_sharper():
    """Nearly always: it is no theorem."""
    sharp = LAWS[0]
    flat = jax.nn.log_softmax(0.5 * sharp, axis=-1)
    assert np.mean(play(jnp.stack([sharp, flat])) == 0) > 0.95
    assert np.mean(play(jnp.stack([flat, sharp])) == 1) > 0.95


def test_ties_and_ends_of_alpha():
    same = jnp.broadcast_to(LAWS[:1], LAWS.shape)
    assert (play(same) == 0).all()
    assert (nearest(same) == 0).all()
    assert (play(LAWS[:2], alpha=1.0) == 0).all()
    assert (play(LAWS[:2], alpha=0.0) == 1).all()


def test_the_tournament_goes_through_the_experts_in_order():
    def by_hand(order):
        champion = order[0]
        for challenger in order[1:]:
            duel = play(LAWS[jnp.array([champion, challenger])])[row]
            champion = champion if int(duel) == 0 else challenger
        return champion

    for row in range(10):
        assert int(play(LAWS)[row]) == by_hand([0, 1, 2])


def test_only_the_rule_without_an_order_does_not_depend_on_it():
    winners, near = [], []
    for order in itertools.permutations(range(3)):
        permuted = LAWS[jnp.array(order)]
        winners.append(np.array(order)[play(permuted)])
        near.append(np.array(order)[nearest(permuted)])
    divergences = np.sort(pool_divergences(LAWS), axis=0)
    clear = divergences[1] - divergences[0] > 1e-5
    assert clear.mean() > 0.9
    assert (np.stack(near)[:, clear] == near[0][clear]).all()
    depends = (np.stack(winners) != winners[0]).any(axis=0)
    assert 0.02 < depends.mean() < 0.6


def test_nearest_is_the_least_divergence_from_the_pool():
    pool = scipy.special.softmax(np.asarray(LAWS, float).mean(axis=0), axis=-1)
    by_hand = (pool * (np.log(pool) - np.asarray(LAWS))).sum(-1)
    np.testing.assert_allclose(pool_divergences(LAWS), by_hand, atol=1e-5)
    weights = jnp.array([0.9, 0.05, 0.05])
    assert np.mean(nearest_to_pool(LAWS, weights) == 0) > 0.95
    assert np.mean(nearest(LAWS) == 0) < 0.6


def test_experts_that_agree_on_nothing_make_no_nan():
    laws = jnp.log(jnp.eye(3))[:, None]
    assert pairwise_margin(laws[0], laws[1]).tolist() == [0.0]
    assert play(laws).tolist() == [0]
    assert np.isfinite(nearest(laws)).all()
    half = jnp.log(jnp.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.2, 0.2, 0.6]]))
    rule = emselect()
    weights = rule.weights((), half[:, None])
    np.testing.assert_allclose(weights.sum(0), 1.0)
    gap = selection_gap(half[:, None], jnp.argmax(weights, axis=0))
    assert not np.isnan(np.stack(gap)).any()


def test_the_gap_is_within_its_bound():
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.1, 4.0, size=(1, 500, 1))
    laws = scipy.special.log_softmax(rng.normal(size=(5, 500, 7)) * scale, axis=-1)
    chosen = jnp.asarray(rng.integers(5, size=500))
    gap = jax.jit(selection_gap)(jnp.asarray(laws, jnp.float32), chosen)
    assert (gap.chosen >= -1e-6).all()
    assert (gap.chosen <= gap.bound).all()
    assert 0.1 < np.mean(gap.chosen == gap.bound) < 0.3


SYMBOLS, STEPS = 3, 4
MODEL = table_model(SYMBOLS)
PARAMS = tuple(table_params(seed, SYMBOLS, 1.2) for seed in (15, 16, 17))
TEXTS = jnp.array(
    [(0, *text) for text in itertools.product(range(SYMBOLS), repeat=STEPS)]
)
"""Every text of four symbols, after a first symbol that is given."""


@pytest.fixture(scope="module", params=["tournament", "pool"])
def enumerated(request):
    """Log-laws of the symbols under pool Q, EMSelect P and the experts, of all texts."""
    return jax.jit(enumerate_laws, static_argnums=0)(request.param, PARAMS)


def enumerate_laws(order, params):
    def laws(rule):
        model = fuse_language_models([MODEL] * 3, rule)
        cache = model.init_cache(len(TEXTS), 8)
        valid = jnp.ones(TEXTS.shape, bool)
        logits, _ = model.extend(params, TEXTS, valid, cache)
        return logits[:, :-1]

    def own(one):
        cache = MODEL.init_cache(len(TEXTS), 8)
        logits, _ = MODEL.extend(one, TEXTS, jnp.ones(TEXTS.shape, bool), cache)
        return jax.nn.log_softmax(logits)[:, :-1]

    experts = jnp.stack([own(one) for one in params])
    rule = emselect(order=order)
    chosen = jnp.argmax(jax.vmap(rule.weights, (None, 2), 2)((), experts), axis=0)
    return laws(uniform()), laws(rule), experts, chosen


def log_prob(laws):
    return np.asarray(
        jnp.take_along_axis(laws, TEXTS[:, 1:, None], axis=-1)[..., 0].sum(-1), float
    )


def test_the_chain_rule_and_the_bound_by_enumeration(enumerated):
    pool, selected, experts, chosen = enumerated
    log_q, log_p = log_prob(pool), log_prob(selected)
    q, p = np.exp(log_q), np.exp(log_p)
    assert q.sum() == pytest.approx(1.0, abs=1e-5)
    assert p.sum() == pytest.approx(1.0, abs=1e-5)
    divergence = (q * (log_q - log_p)).sum()
    gap = jax.jit(sequence_gap)(experts, chosen, jnp.ones(chosen.shape, bool))
    assert divergence == pytest.approx(float((q * gap.chosen).sum()), rel=1e-4)
    bound = float((q * gap.bound).sum())
    assert divergence < bound
    assert (gap.chosen <= gap.bound).all()
    # What texts that EMSelect wrote would estimate is another number.
    assert abs((p * gap.chosen).sum() - divergence) > 0.02 * divergence
    # A text of the law P does have that law: it is scored by the chosen experts.
    index = chosen[None, ..., None]
    by_choice = jnp.take_along_axis(experts, index, axis=0)[0]
    np.testing.assert_allclose(selected, by_choice, atol=1e-5)


def draw(weights, gap):
    """Mean gap of texts drawn from a law, and its standard error."""
    texts = np.random.default_rng(0).choice(
        len(TEXTS), size=40_000, p=weights / weights.sum()
    )
    values = np.asarray(gap)[texts]
    return values.mean(), values.std() / np.sqrt(len(values))


def test_texts_of_the_pool_estimate_the_divergence_and_those_of_emselect_do_not(
    enumerated,
):
    pool, selected, experts, chosen = enumerated
    log_q, log_p = log_prob(pool), log_prob(selected)
    divergence = (np.exp(log_q) * (log_q - log_p)).sum()
    gap = sequence_gap(experts, chosen, jnp.ones(chosen.shape, bool)).chosen
    mean, error = draw(np.exp(log_q), gap)
    assert abs(mean - divergence) < 4 * error
    mean, error = draw(np.exp(log_p), gap)
    assert abs(mean - divergence) > 4 * error


def test_only_valid_tokens_count():
    laws, chosen = LAWS[:, None, :4], jnp.zeros((1, 4), jnp.int32)
    total = jax.jit(sequence_gap)
    half = total(laws, chosen, jnp.arange(4)[None] < 2)
    each = [total(laws, chosen, jnp.arange(4)[None] == t).chosen for t in (0, 1)]
    np.testing.assert_allclose(half.chosen, sum(each), rtol=1e-6)
    assert half.bound < total(laws, chosen, jnp.ones((1, 4), bool)).bound


def test_the_gap_may_be_taken_to_a_weighted_pool():
    weights = jnp.array([1.0, 0.0, 0.0])
    gap = selection_gap(LAWS, jnp.zeros(200, jnp.int32), weights)
    np.testing.assert_allclose(gap.chosen, 0.0, atol=1e-5)
    assert log_opinion_pool(LAWS, weights).shape == LAWS.shape[1:]
    assert (gap.bound > 0.01).mean() > 0.9
