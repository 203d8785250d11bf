"""Rules by name, and the formulas of those that need no prompt or learn from the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from emfuse_jax.energy import log_opinion_pool
from emfuse_jax.llm.evidence import evidence, exponentiated_gradient
from emfuse_jax.llm.packllm import packllm_sim_weights
from emfuse_jax.llm.rules import (
    FUSION_RULES,
    entropy_adaptive,
    fixed,
    linear_pool,
    rule_by_name,
    uniform,
)

RNG = np.random.default_rng(0)
MODELS, BATCH, TIME, VOCAB = 3, 2, 6, 4
LOG_PROBS = jnp.asarray(
    scipy.special.log_softmax(RNG.normal(size=(3, 2, 6, 4)) * 1.5, -1), jnp.float32
)
TOKENS = jnp.asarray(RNG.integers(VOCAB, size=(BATCH, TIME)))
VALID = jnp.ones((BATCH, TIME), bool)


def weights_now(rule, log_probs):
    """Of a rule that needs no prompt."""
    state = rule.init(
        log_probs[:, :, None],
        jnp.zeros((log_probs.shape[1], 1), jnp.int32),
        jnp.ones((log_probs.shape[1], 1), bool),
    )
    return rule.weights(state, log_probs)


def test_uniform_and_fixed_weights():
    now = LOG_PROBS[:, :, 0]
    np.testing.assert_allclose(weights_now(uniform(), now), 1 / 3, rtol=1e-6)
    found = weights_now(fixed([0.5, 0.3, 0.2]), now)
    np.testing.assert_allclose(found, [[0.5] * 2, [0.3] * 2, [0.2] * 2], rtol=1e-6)
    assert not fixed([1.0]).linear
    assert linear_pool().linear
    assert linear_pool([0.5, 0.5]).linear


def test_certain_experts_weigh_more_and_none_weighs_nothing():
    laws = jnp.log(
        jnp.array([[0.97, 0.01, 0.01, 0.01], [0.25] * 4, [0.7, 0.1, 0.1, 0.1]])
    )
    laws = laws[:, None]
    entropies = -(jnp.exp(laws) * laws).sum(-1)[:, 0]
    certainty = (1 - entropies / np.log(4)) ** 2
    expected = (certainty + 0.2) / (certainty + 0.2).sum()
    found = weights_now(entropy_adaptive(0.2, 2.0), laws)[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[0] > found[2] > found[1] > 0.1
    heavy = weights_now(entropy_adaptive(1e4), laws)
    np.testing.assert_allclose(heavy, 1 / 3, atol=1e-4)
    lost = weights_now(entropy_adaptive(), jnp.full((3, 1, 4), -np.log(4.0)))
    np.testing.assert_allclose(lost, 1 / 3, atol=1e-5)


def test_entropies_of_vetoes_are_finite():
    laws = jnp.log(jnp.eye(3))[:, None]
    np.testing.assert_allclose(weights_now(entropy_adaptive(), laws), 1 / 3, rtol=1e-6)
    alone = weights_now(entropy_adaptive(), jnp.zeros((2, 1, 1)))
    np.testing.assert_allclose(alone, 0.5)


def states(rule):
    """The weights before each token of a text, read one by one."""
    state = rule.init(LOG_PROBS[:, :, :1], TOKENS[:, :1], VALID[:, :1])
    found = [rule.weights(state, LOG_PROBS[:, :, 0])]
    for column in range(TIME - 1):
        state = rule.observe(state, LOG_PROBS[:, :, column], TOKENS[:, column + 1])
        found.append(rule.weights(state, LOG_PROBS[:, :, column + 1]))
    return np.stack(found)


def gained(row):
    """What each expert gave to the tokens of a row ``[token, model]``."""
    return np.array(
        [LOG_PROBS[:, row, t, TOKENS[row, t + 1]] for t in range(TIME - 1)], np.float64
    )


def test_evidence_is_the_recursion_by_hand():
    found = states(evidence(0.7, 0.8))
    for row in range(BATCH):
        score = np.zeros(MODELS)
        np.testing.assert_allclose(found[0, :, row], 1 / 3, rtol=1e-6)
        for t, gain in enumerate(gained(row)):
            score = 0.8 * score + gain
            expected = scipy.special.softmax(0.7 * score)
            np.testing.assert_allclose(found[t + 1, :, row], expected, rtol=1e-4)
            by_sum = sum(0.8 ** (t - s) * g for s, g in enumerate(gained(row)[: t + 1]))
            np.testing.assert_allclose(score, by_sum)
    plain = states(evidence(0.7, 1.0))
    assert np.abs(plain - found).max() > 0.02


def test_evidence_with_entropy_is_the_product():
    found = states(evidence(0.7, 0.8, entropy_power=2.0))
    plain = states(evidence(0.7, 0.8))
    laws = np.asarray(LOG_PROBS, np.float64)
    entropies = -(np.exp(laws) * laws).sum(-1)
    product = plain * np.moveaxis((0.1 + entropies) ** -2.0, -1, 0)
    np.testing.assert_allclose(
        found, product / product.sum(1, keepdims=True), rtol=1e-4
    )
    assert np.abs(found - plain).max() > 0.05


def test_evidence_that_never_forgets_is_packllm_sim():
    temperature, count = 0.4, TIME - 1
    rule = evidence(1 / (temperature * count), 1.0, floor=-1e3)
    state = rule.init(LOG_PROBS, TOKENS, VALID)
    packed = packllm_sim_weights(LOG_PROBS, TOKENS, VALID, temperature=temperature)
    np.testing.assert_allclose(
        rule.weights(state, LOG_PROBS[:, :, -1]), packed, rtol=1e-4
    )


def test_one_impossible_token_does_not_silence_an_expert():
    laws = jnp.log(jnp.array([[[0.0, 1.0]], [[0.6, 0.4]]]))
    rule = evidence(0.5, 0.5, floor=-10.0)
    zero = jnp.zeros(1, jnp.int32)
    state = rule.init(laws[:, :, None], zero[:, None], jnp.ones((1, 1), bool))
    state = rule.observe(state, laws, zero)
    low = rule.weights(state, laws)[0, 0]
    ratio = np.exp(0.5 * (-10.0 - np.log(0.6)))
    np.testing.assert_allclose(low, ratio / (1 + ratio), rtol=1e-4)
    for _ in range(20):
        state = rule.observe(state, laws, zero + 1)
    assert rule.weights(state, laws)[0, 0] > 0.5


def test_the_gradient_rule_goes_down_the_loss_of_the_pool():
    """One step is ``-η ∂(-log q(y))/∂λ``, taken in the logarithms of the weights."""
    rate = 0.3
    rule = exponentiated_gradient(rate, 1.0)
    state = rule.init(LOG_PROBS[:, :, :1], TOKENS[:, :1], VALID[:, :1])
    state = rule.observe(state, LOG_PROBS[:, :, 0], TOKENS[:, 1])
    held = rule.weights(state, LOG_PROBS[:, :, 0])
    state = rule.observe(state, LOG_PROBS[:, :, 1], TOKENS[:, 2])
    moved = rule.weights(state, LOG_PROBS[:, :, 1])

    def loss(weights, row):
        return -log_opinion_pool(LOG_PROBS[:, row, 1], weights)[TOKENS[row, 2]]

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    for row in range(BATCH):
        gradient = np.asarray(slope(held[:, row], row))
        expected = held[:, row] * np.exp(-rate * gradient)
        np.testing.assert_allclose(moved[:, row], expected / expected.sum(), rtol=1e-4)
        # Plain evidence goes elsewhere: it rewards who is sharp as well.
        bold = held[:, row] * np.exp(rate * LOG_PROBS[:, row, 1, TOKENS[row, 2]])
        assert np.abs(moved[:, row] - bold / bold.sum()).max() > 1e-3


def test_online_gradient_descent_finds_the_best_weights():
    """On text drawn from a pool, the weights come near to that pool's."""
    rng = np.random.default_rng(3)
    laws = scipy.special.log_softmax(rng.normal(size=(2, 1, 6)) * 2, -1)
    laws = jnp.asarray(laws, jnp.float32)
    truth = log_opinion_pool(laws, jnp.array([0.8, 0.2]))[0]
    text = jax.random.categorical(jax.random.key(0), truth, shape=(3000, 1))
    rule = exponentiated_gradient(0.01, 1.0)
    state = rule.init(laws[:, :, None], text[:1], jnp.ones((1, 1), bool))

    def step(state, token):
        return rule.observe(state, laws, token), rule.weights(state, laws)[0, 0]

    _, path = jax.lax.scan(step, state, text)
    assert path[0] == pytest.approx(0.5)
    assert path[2000:].mean() == pytest.approx(0.8, abs=0.1)


def test_names_are_complete():
    assert rule_by_name("emfuse").weights is not None
    assert not rule_by_name("emselect", alpha=0.3, order="pool").needs_prompt
    assert rule_by_name("fixed", weights=[0.5, 0.5]).observe is None
    for name in FUSION_RULES:
        options = {"weights": [1.0]} if name == "fixed" else {}
        rule_by_name(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("emfus", {}, "no fusion rule 'emfus'; there are emfuse, uniform, fixed, ent"),
        ("uniform", {"alpha": 0.5}, r"unexpected keyword argument 'alpha'; its opt"),
        ("fixed", {}, "missing a required argument: 'weights'; its options are"),
        ("fixed", {"weights": [0.5, 0.6]}, "sum to 1.1, expected 1"),
        ("fixed", {"weights": [1.5, -0.5]}, "hold a negative"),
        ("fixed", {"weights": 0.5}, r"shape \(\), expected one per expert"),
        ("linear_pool", {"weights": [0.2, 0.2]}, "sum to 0.4"),
        ("emselect", {"alpha": 1.5}, r"alpha 1.5, expected a number in \[0, 1\]"),
        ("emselect", {"order": "random"}, "order 'random', expected 'tournament'"),
        ("entropy_adaptive", {"smoothing": 0.0}, "smoothing 0.0, expected a positive"),
        ("entropy_adaptive", {"power": np.inf}, "power inf, expected a positive"),
        ("packllm_sim", {"temperature": -1.0}, "temperature -1.0, expected a pos"),
        ("evidence", {"rate": -1.0}, "rate -1.0, expected 0"),
        ("evidence", {"rate": np.inf}, "rate inf, expected 0"),
        ("evidence", {"floor": -np.inf}, "floor -inf, expected a finite"),
        ("evidence", {"entropy_power": np.inf}, "entropy_power inf, expected 0"),
        ("exponentiated_gradient", {"rate": np.nan}, "rate nan, expected 0"),
        ("evidence", {"decay": 1.5}, r"decay 1.5, expected a number in \[0, 1\]"),
        ("evidence", {"floor": 1.0}, "floor 1.0, expected a finite negative"),
        ("evidence", {"entropy_power": -1.0}, "entropy_power -1.0, expected 0"),
        ("exponentiated_gradient", {"decay": -0.1}, "decay -0.1, expected"),
    ],
)
@pytest.mark.untyped
def test_bad_rules_are_named_with_the_fix(name, options, message):
    with pytest.raises(ValueError, match=message):
        rule_by_name(name, **options)
