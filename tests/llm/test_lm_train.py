"""Training: the loss is the next token's, the schedule and the decay are as stated, and a
source of known entropy is learned to its entropy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import loops, tree
from emfuse_jax.llm.config import LmConfig
from emfuse_jax.llm.model import init_params, logits
from emfuse_jax.llm.train import (
    LmTrainConfig,
    learning_rate,
    lm_learner,
    next_token_loss,
)

CONFIG = LmConfig(
    vocab_size=7,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    context_length=16,
    tied=True,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 7, (3, 9)), jnp.int32)
losses = jax.jit(functools.partial(next_token_loss, CONFIG))


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def learner():
    return lm_learner(CONFIG)


def test_the_loss_is_of_the_token_that_follows(params):
    valid = jnp.ones(TOKENS.shape, bool)
    compiled = jax.jit(functools.partial(logits, CONFIG))
    scores = np.asarray(compiled(params, TOKENS, valid), np.float64)
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    loss = losses(params, TOKENS)
    assert loss.shape == (3, 8)
    rows, columns = np.indices((3, 8))
    tokens = np.asarray(TOKENS)
    expected = -log_probs[rows, columns, tokens[:, 1:]]
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    # Of the token itself, or of the one before, it would be another number.
    wrong = -log_probs[rows, columns, tokens[:, :-1]]
    assert np.abs(np.asarray(loss) - wrong).max() > 0.01


def test_padding_costs_nothing_and_changes_nothing(params):
    alone = losses(params, TOKENS)
    for left, right in ((2, 0), (0, 3)):
        pads = ((0, 0), (left, right))
        tokens = jnp.pad(TOKENS, pads, constant_values=5)
        valid = jnp.pad(jnp.ones(TOKENS.shape, bool), pads)
        loss = np.asarray(losses(params, tokens, valid))
        np.testing.assert_allclose(loss[:, left : left + 8], alone, atol=1e-5)
        assert not loss[:, :left].any()
        assert not loss[:, left + 8 :].any()


def test_the_rate_rises_and_falls():
    training = LmTrainConfig(learning_rate=2.0, warmup=0.1, final_rate=0.25)
    steps, total = jnp.arange(100), jnp.asarray(100)
    rates = np.asarray(jax.vmap(lambda s: learning_rate(training, s, total))(steps))
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    assert rates.argmax() == 9
    # Half way between the peak and the end the cosine is at its mean.
    np.testing.assert_allclose(rates[54], 2.0 * (1.0 + 0.25) / 2, rtol=1e-5)
    np.testing.assert_allclose(rates[99], 0.5, rtol=1e-5)
    assert (np.diff(rates[9:]) < 0).all()
    one = learning_rate(training, jnp.asarray(0), jnp.asarray(1))
    assert 0.5 <= float(one) <= 2.0


def test_only_matrices_decay(params):
    """Adam's direction does not depend on the decay, so one update differs by
    rate × decay × weight, and by nothing in norms and biases."""
    batch = TOKENS
    config = LmConfig(
        family="qwen2",
        vocab_size=7,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
    )
    start = init_params(jax.random.key(1), config)
    start = jax.tree.map(lambda leaf: leaf + 0.5, start)  # biases too
    ends = []
    for decay in (0.0, 0.3):
        training = LmTrainConfig(weight_decay=decay, learning_rate=0.01)
        learner = lm_learner(config, training)
        state, metrics = jax.jit(learner.update)(
            jax.random.key(0), learner.init(jax.random.key(0), 1, start), batch
        )
        ends.append(state.params)
    rate = metrics["learning_rate"]
    shrunk = jax.tree.map(lambda a, b: np.asarray(a - b), *ends)
    for leaf, found in zip(
        jax.tree.leaves(start), jax.tree.leaves(shrunk), strict=True
    ):
        expected = rate * 0.3 * leaf if leaf.ndim == 2 else jnp.zeros_like(leaf)
        np.testing.assert_allclose(found, expected, atol=2e-6)
    assert max(leaf.max() for leaf in jax.tree.leaves(shrunk)) > 1e-3


def test_an_update_leaves_what_it_was_given(learner, params):
    state = learner.init(jax.random.key(0), 10, params)
    before = jax.tree.map(np.array, state)
    update = jax.jit(learner.update)
    new, metrics = update(jax.random.key(1), state, TOKENS)
    assert tree.same_structure(new, state)
    jax.tree.map(np.testing.assert_array_equal, before, state)
    assert all(jnp.shape(value) == () for value in metrics.values())
    assert int(new.step) == 1
    loss = jnp.mean(losses(params, TOKENS))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    # Another number of steps is another state of the same program.
    update(jax.random.key(1), learner.init(jax.random.key(0), 20, params), TOKENS)
    assert update._cache_size() == 1


def test_starts_are_random_or_given(learner, params):
    given = learner.init(jax.random.key(5), 3, params)
    jax.tree.map(np.testing.assert_array_equal, given.params, params)
    random = learner.init(jax.random.key(5), 3)
    assert tree.same_structure(random.params, params)
    assert not np.array_equal(random.params["embed"], params["embed"])
    with pytest.raises(ValueError, match="num_steps=0"):
        learner.init(jax.random.key(5), 0)


def test_a_markov_source_is_learned_to_its_entropy():
    """Each symbol is followed by its successor with probability 0.7, else by any: what can
    be known is the entropy rate; without reading the last token, log 7."""
    stay, size = 0.7, 7
    law = np.full(size, (1 - stay) / size)
    law[0] += stay
    entropy = -np.sum(law * np.log(law))
    batch, length = 16, 17

    def draw(key, data):
        del data
        key_start, key_jump, key_free = jax.random.split(key, 3)
        jumps = jax.random.bernoulli(key_jump, stay, (batch, length))
        free = jax.random.randint(key_free, (batch, length), 0, size)
        first = jax.random.randint(key_start, (batch,), 0, size)

        def follow(last, drawn):
            jump, other = drawn
            token = jnp.where(jump, (last + 1) % size, other)
            return token, token

        _, tokens = jax.lax.scan(follow, first, (jumps.T, free.T))
        return tokens.T

    learner = lm_learner(CONFIG, LmTrainConfig(learning_rate=0.02))
    state = learner.init(jax.random.key(0), 200)
    state, _ = jax.jit(lambda s: loops.fit(jax.random.key(1), learner, s, draw, 200))(
        state
    )
    keys = jax.random.split(jax.random.key(2), 20)
    fresh = jax.jit(jax.vmap(lambda key: draw(key, None)))(keys).reshape(-1, length)
    loss = np.asarray(losses(state.params, fresh))
    error = loss.mean(axis=1).std() / np.sqrt(len(loss))
    # Below the entropy by chance alone, above it by what is not learned yet.
    assert loss.mean() > entropy - 4 * error
    assert loss.mean() < entropy + 0.05
    assert np.log(size) - entropy > 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"final_rate": 1.5}, "final_rate=1.5"),
    ],
)
def test_settings_that_mean_nothing(changes, words):
    with pytest.raises(ValueError, match=words):
        LmTrainConfig(**changes)
