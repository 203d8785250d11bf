"""PackLLM's weights: against the authors' procedure, at ties, and without a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from emfuse_jax.energy import log_opinion_pool
from emfuse_jax.llm.packllm import (
    packllm_opt_weights,
    packllm_sim,
    packllm_sim_weights,
    top_one,
)

MODELS, BATCH, TIME, VOCAB = 3, 4, 7, 5
RNG = np.random.default_rng(0)
# Experts of different quality: each is drawn to the truth by another strength.
TOKENS = RNG.integers(VOCAB, size=(BATCH, TIME))
LOGITS = RNG.normal(size=(MODELS, BATCH, TIME, VOCAB)) * 1.5
for expert, pull in enumerate((0.3, 1.2, 0.8)):
    LOGITS[expert, :, :-1] += pull * np.eye(VOCAB)[TOKENS[:, 1:]]
LOG_PROBS = scipy.special.log_softmax(LOGITS, axis=-1)
VALID = np.ones((BATCH, TIME), bool)
VALID[1, :2] = False
VALID[2, 5:] = False

opt = jax.jit(packllm_opt_weights)
sim = jax.jit(packllm_sim_weights)


def cross_entropy(log_probs, row):
    """Mean over the predicted tokens of one row, of ``[time, vocab]``."""
    columns = [t for t in range(TIME - 1) if VALID[row, t] and VALID[row, t + 1]]
    return -np.mean([log_probs[t, TOKENS[row, t + 1]] for t in columns])


def losses(row):
    return np.array([cross_entropy(expert[row], row) for expert in LOG_PROBS])


def search(row):
    """The procedure of the authors' code, on raw logits; and the winners' margin."""
    loss = losses(row)
    order = np.argsort(loss, kind="stable")
    current, weights, margin = LOGITS[order[0], row], [1.0], np.inf
    for expert in order[1:]:
        best, best_share, values = np.inf, None, []
        for share in np.arange(21) / 20:
            mixed = share * current + (1 - share) * LOGITS[expert, row]
            value = cross_entropy(scipy.special.log_softmax(mixed, axis=-1), row)
            values.append(value)
            if value < best:
                best, best_share = value, share
        margin = min(margin, np.diff(np.sort(values)[:2])[0])
        current = best_share * current + (1 - best_share) * LOGITS[expert, row]
        weights = [w * best_share for w in weights] + [1 - best_share]
    given = np.empty(MODELS)
    given[order] = weights
    return given, margin


def arrays(dtype=jnp.float32):
    return jnp.asarray(LOG_PROBS, dtype), jnp.asarray(TOKENS), jnp.asarray(VALID)


def test_sim_is_the_softmax_of_the_losses():
    expected = np.stack([scipy.special.softmax(-losses(row) / 0.3) for row in range(4)])
    found = jax.jit(lambda *a: packllm_sim_weights(*a, temperature=0.3))(*arrays())
    np.testing.assert_allclose(found, expected.T, rtol=1e-5)
    perplexities = np.exp(np.stack([losses(row) for row in range(4)])).T
    powers = perplexities ** (-1 / 0.3)
    np.testing.assert_allclose(found, powers / powers.sum(0), rtol=1e-5)
    assert np.abs(found - sim(*arrays())).max() > 0.05


def test_opt_is_the_search_of_the_authors():
    searches = [search(row) for row in range(BATCH)]
    assert min(margin for _, margin in searches) > 1e-6
    found = opt(*arrays())
    expected = np.stack([weights for weights, _ in searches], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # It is a search: neither uniform, nor one expert, nor the same in all rows.
    assert (np.abs(expected - 1 / 3).max(0) > 0.1).any()
    assert (expected.max(0) < 1).any()
    assert np.abs(expected - expected[:, :1]).max() > 0.1


def pooled_loss(weights, row):
    pooled = log_opinion_pool(jnp.asarray(LOG_PROBS[:, row]), jnp.asarray(weights))
    return cross_entropy(np.asarray(pooled), row)


def test_opt_is_never_worse_on_the_prompt_than_its_best_member():
    weights = np.asarray(opt(*arrays()))
    for row in range(BATCH):
        best = losses(row).min()
        assert pooled_loss(weights[:, row], row) <= best + 1e-6
    uniform = [
        pooled_loss(np.full(3, 1 / 3), row) - losses(row).min() for row in range(4)
    ]
    assert max(uniform) > 0.01


def test_two_experts_get_weights_of_the_grid():
    log_probs, tokens, valid = arrays()
    weights = np.asarray(opt(log_probs[:2], tokens, valid))
    np.testing.assert_allclose(weights * 20, np.round(weights * 20), atol=1e-4)
    row = 0
    every = [pooled_loss_of_two(share, row) for share in np.arange(21) / 20]
    assert weights[0, row] == pytest.approx(np.argmin(every) / 20)


def pooled_loss_of_two(share, row):
    mixed = share * LOGITS[0, row] + (1 - share) * LOGITS[1, row]
    return cross_entropy(scipy.special.log_softmax(mixed, axis=-1), row)


def certain(expert_tokens):
    """Experts that are certain of one token each, in every column."""
    rows = [jnp.log(jnp.eye(2))[token] for token in expert_tokens]
    return jnp.stack([jnp.tile(row, (1, 3, 1)) for row in rows])


def test_in_a_tie_the_expert_that_joins_gets_all():
    tokens, valid = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    # Both predict the prompt perfectly: every share is as good, and 0 is the smallest.
    assert opt(certain([0, 0]), tokens, valid)[:, 0].tolist() == [0.0, 1.0]
    # Who calls the prompt impossible joins with nothing.
    assert opt(certain([1, 0]), tokens, valid)[:, 0].tolist() == [0.0, 1.0]
    assert opt(certain([0, 1]), tokens, valid)[:, 0].tolist() == [1.0, 0.0]


def test_where_all_call_the_prompt_impossible_nothing_is_nan():
    tokens, valid = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    vetoing = certain([1, 1])
    np.testing.assert_allclose(sim(vetoing, tokens, valid)[:, 0], [0.5, 0.5])
    weights = opt(vetoing, tokens, valid)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(0), 1.0)


def test_top_one_is_the_limit_of_sim():
    log_probs, tokens, valid = arrays()
    rule = top_one()
    weights = rule.weights(rule.init(log_probs, tokens, valid), log_probs[:, :, -1])
    best = np.array([losses(row).argmin() for row in range(BATCH)])
    np.testing.assert_array_equal(weights, np.eye(3)[:, best])
    cold = packllm_sim_weights(log_probs, tokens, valid, temperature=1e-3)
    np.testing.assert_allclose(weights, cold, atol=1e-5)
    same = jnp.broadcast_to(log_probs[:1], log_probs.shape)
    tied = rule.weights(rule.init(same, tokens, valid), same[:, :, -1])
    np.testing.assert_array_equal(tied.argmax(0), 0)


@pytest.mark.parametrize("first_valid", [TIME, TIME - 1])
def test_a_prompt_that_predicts_nothing_gives_uniform_weights(first_valid):
    log_probs, tokens, _ = arrays()
    valid = jnp.broadcast_to(jnp.arange(TIME)[None] >= first_valid, (BATCH, TIME))
    rule = top_one()
    chosen = rule.weights(rule.init(log_probs, tokens, valid), log_probs[:, :, -1])
    for weights in (
        sim(log_probs, tokens, valid),
        opt(log_probs, tokens, valid),
        chosen,
    ):
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_padding_may_hold_anything():
    log_probs, tokens, valid = arrays()
    holes = jnp.where(valid[None, ..., None], log_probs, jnp.nan)
    for function in (sim, opt):
        np.testing.assert_allclose(
            function(holes, tokens, valid), function(log_probs, tokens, valid)
        )
    assert np.isnan(holes).any()


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_bad_temperatures_are_named(temperature):
    with pytest.raises(ValueError, match=f"temperature {temperature}, expected a pos"):
        packllm_sim(temperature)
