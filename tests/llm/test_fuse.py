"""Fused language models: the law, the rules in it, and reading in any pieces."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

import emfuse_jax.llm.fuse
from emfuse_jax import tree
from emfuse_jax.energy import log_opinion_pool
from emfuse_jax.llm._rule import FusionRule, memoryless, uniform_weights
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.rules import FUSION_RULES, evidence, fixed, rule_by_name, uniform
from llm._table_model import table_model, table_params

VOCAB, PROMPT = 5, 4
MODEL = table_model(VOCAB)
PARAMS = tuple(table_params(seed, VOCAB) for seed in range(3))
STACK = tree.stack(PARAMS)
# Hundreds of tiny programs: compiling them well would take longer than running them.
compiled = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": "0"}
)
RULES = {
    name: functools.partial(rule_by_name, name)
    for name in FUSION_RULES
    if name not in ("emfuse", "fixed")
}
RULES["emselect_pool"] = functools.partial(rule_by_name, "emselect", order="pool")
RULES["evidence_linear"] = lambda: evidence(2.0, 0.8, linear=True)
TEXT = jax.random.randint(jax.random.key(9), (3, 8), 0, VOCAB)
ALL_VALID = jnp.ones((3, 8), bool)


def read_in_pieces(model, params, tokens, valid):
    """A prompt at once, then the rest at once and one by one."""
    start = model.init_cache(len(tokens), 16)
    prompt, rest = tokens[:, :PROMPT], tokens[:, PROMPT:]
    columns, cache = model.prefill(params, prompt, valid[:, :PROMPT], start)
    last, same = model.prefill(params, prompt, valid[:, :PROMPT], start, last_only=True)
    extended, after = model.extend(params, rest, valid[:, PROMPT:], cache)

    def step(cache, token):
        logits, cache = model.step(params, token, cache)
        return cache, logits

    stepped_cache, stepped = jax.lax.scan(step, cache, rest.T)
    return {
        "columns": columns,
        "last": last,
        "caches": (cache, same),
        "extended": extended,
        "stepped": jnp.moveaxis(stepped, 0, 1),
        "after": (after, stepped_cache),
    }


@functools.cache
def reader(name):
    model = fuse_language_models(MODEL, RULES[name](), num_models=3)
    return compiled(functools.partial(read_in_pieces, model))


@functools.cache
def read(name):
    return reader(name)(STACK, TEXT, ALL_VALID)


def expert_log_probs(params, tokens):
    cache = MODEL.init_cache(len(tokens), 16)
    logits, _ = MODEL.extend(params, tokens, jnp.ones(tokens.shape, bool), cache)
    return np.asarray(jax.nn.log_softmax(logits))


EXPERTS = np.stack([expert_log_probs(params, TEXT) for params in PARAMS])


def extend(model, params=PARAMS):
    """The whole text at once, into an empty cache."""
    return compiled(model.extend)(params, TEXT, ALL_VALID, model.init_cache(3, 16))


def close(actual, expected, atol=2e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("name", RULES)
def test_extending_equals_repeated_steps(name):
    found = read(name)
    close(found["extended"], found["stepped"])
    close(*found["after"])
    # A text's second half is not its first: the comparison is not of constants.
    assert np.abs(found["extended"] - found["columns"]).max() > 0.1


@pytest.mark.parametrize("name", RULES)
def test_the_last_column_alone_is_the_last_column(name):
    found = read(name)
    assert found["last"].shape == (3, 1, VOCAB)
    close(found["last"][:, 0], found["columns"][:, -1])
    close(*found["caches"])


@pytest.mark.parametrize("name", RULES)
def test_laws_are_normalised_and_weights_convex(name):
    found = read(name)
    for part in ("columns", "extended"):
        np.testing.assert_allclose(jnp.exp(found[part]).sum(-1), 1.0, atol=1e-5)
    weights = found["after"][0].weights
    assert weights.shape == (3, 3)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(0), 1.0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_no_column_knows_what_comes_after_it(name):
    for column in (PROMPT - 1, 7):
        other = TEXT.at[:, column].set((TEXT[:, column] + 1) % VOCAB)
        before = read(name)
        after = reader(name)(STACK, other, ALL_VALID)
        first, second = (
            np.concatenate([found["columns"], found["extended"]], axis=1)
            for found in (before, after)
        )
        np.testing.assert_array_equal(first[:, :column], second[:, :column])
        assert np.abs(first[:, column] - second[:, column]).max() > 0.01


@pytest.mark.parametrize("name", RULES)
def test_a_pool_of_one_is_the_model(name):
    model = fuse_language_models([MODEL], RULES[name]())
    logits, _ = extend(model, PARAMS[:1])
    np.testing.assert_allclose(logits, EXPERTS[0], atol=2e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_veto_leaves_no_nan(name):
    # Expert 0 never says token 2, and the text says it all the time.
    vetoing = {**PARAMS[0], "first": PARAMS[0]["first"].at[:, 2].set(-jnp.inf)}
    text = TEXT.at[:, 1::2].set(2)
    found = reader(name)(tree.stack([vetoing, *PARAMS[1:]]), text, ALL_VALID)
    for leaf in jax.tree.leaves(found):
        assert not np.isnan(leaf).any()
    vetoed = (found["extended"][..., 2] == -np.inf).all()
    if name in ("uniform", "entropy_adaptive"):
        assert vetoed
    if name in ("linear_pool", "evidence_linear"):
        assert not vetoed


def test_every_rule_is_tested():
    tested = {"emfuse", "fixed", *RULES}
    assert set(FUSION_RULES) <= tested


def unpadded_and_padded(rule):
    """One text read without padding, and with padding on both sides of each piece."""
    model = fuse_language_models([MODEL] * 3, rule)
    text = TEXT[:1]

    def plain(params):
        cache = model.init_cache(1, 16)
        valid = jnp.ones((1, 4), bool)
        logits, cache = model.prefill(params, text[:, :4], valid, cache, last_only=True)
        more, cache = model.extend(params, text[:, 4:6], valid[:, :2], cache)
        end, cache = model.step(params, text[:, 6], cache)
        return (logits[:, 0], more, end), cache

    def padded(params):
        cache = model.init_cache(1, 16)
        tokens = jnp.pad(text[:, :4], ((0, 0), (2, 0)))
        valid = jnp.arange(6)[None] >= 2
        columns, cache = model.prefill(params, tokens, valid, cache)
        nothing = jnp.zeros((1, 2), bool)
        _, cache = model.extend(params, text[:, :2], nothing, cache)
        tokens = jnp.pad(text[:, 4:6], ((0, 0), (0, 2)))
        more, cache = model.extend(params, tokens, jnp.arange(4)[None] < 2, cache)
        end, cache = model.step(params, text[:, 6], cache)
        return (columns[:, -1], more[:, :2], end), cache

    return compiled(plain)(PARAMS), compiled(padded)(PARAMS)


@pytest.mark.parametrize("name", ["packllm_opt", "evidence"])
def test_padding_is_invisible(name):
    plain, padded = unpadded_and_padded(RULES[name]())
    close(plain, padded)
    (first, more, end), _ = plain
    assert np.abs(first - end).max() > 1e-2
    assert np.abs(more[:, 0] - end).max() > 1e-2


def test_a_prompt_padded_on_the_right_is_fused_at_its_end():
    model = fuse_language_models([MODEL] * 3, RULES["evidence"]())
    cache = model.init_cache(1, 16)
    tokens = jnp.pad(TEXT[:1, :3], ((0, 0), (0, 2)))
    valid = jnp.arange(5)[None] < 3
    prefill = compiled(functools.partial(model.prefill, last_only=True))
    padded, cached = prefill(PARAMS, tokens, valid, cache)
    plain, same = prefill(PARAMS, TEXT[:1, :3], jnp.ones((1, 3), bool), cache)
    close((padded, cached), (plain, same))
    read_as_text, _ = prefill(PARAMS, tokens, jnp.ones((1, 5), bool), cache)
    assert np.abs(read_as_text - plain).max() > 1e-2


def test_a_stack_equals_a_tuple():
    name = "evidence"
    model = fuse_language_models([MODEL] * 3, RULES[name]())
    found = compiled(functools.partial(read_in_pieces, model))(PARAMS, TEXT, ALL_VALID)
    for part in ("columns", "extended", "stepped"):
        close(found[part], read(name)[part])
    assert read(name)["after"][0].experts.previous.shape == (3, 3)


def test_the_law_is_the_log_opinion_pool_of_the_energy_floor():
    assert emfuse_jax.llm.fuse.log_opinion_pool is log_opinion_pool
    found = read("uniform")
    total = EXPERTS.mean(axis=0)
    expected = scipy.special.log_softmax(total, axis=-1)
    np.testing.assert_allclose(found["columns"], expected[:, :PROMPT], atol=1e-5)
    np.testing.assert_allclose(found["extended"], expected[:, PROMPT:], atol=1e-5)


def test_one_hot_weights_are_that_expert():
    logits, _ = extend(fuse_language_models([MODEL] * 3, fixed([0.0, 1.0, 0.0])))
    np.testing.assert_allclose(logits, EXPERTS[1], atol=1e-5)
    assert np.abs(logits - EXPERTS[0]).max() > 1


def raw_logits(params, tokens):
    cache = MODEL.init_cache(len(tokens), 16)
    return MODEL.extend(params, tokens, jnp.ones(tokens.shape, bool), cache)[0]


@pytest.mark.parametrize("name", ["packllm_sim", "packllm_opt"])
def test_packllm_is_the_pool_at_temperature_one(name):
    """``softmax(Σ λ z)`` of raw logits, as PackLLM computes it."""
    found = read(name)
    weights = found["caches"][0].weights
    assert np.abs(weights - 1 / 3).max() > 0.1
    logits = np.stack([raw_logits(params, TEXT) for params in PARAMS])
    packed = scipy.special.log_softmax(
        np.einsum("mb,mbtv->btv", weights, logits), axis=-1
    )
    np.testing.assert_allclose(found["extended"], packed[:, PROMPT:], atol=2e-5)

    # A sum of other than one, or a temperature of the experts, breaks the identity.
    sharper = scipy.special.log_softmax(
        1.5 * np.einsum("mb,mbtv->btv", weights, logits), axis=-1
    )
    assert np.abs(found["extended"] - sharper[:, PROMPT:]).max() > 0.1


def test_temperatures_flatten_each_expert_first():
    temperatures = [0.5, 1.0, 3.0]
    weights = [0.2, 0.5, 0.3]
    model = fuse_language_models([MODEL] * 3, fixed(weights), temperatures=temperatures)
    stacked = fuse_language_models(
        MODEL, fixed(weights), temperatures=temperatures, num_models=3
    )
    logits, _ = extend(model)
    same, _ = extend(stacked, STACK)
    total = sum(
        weight * EXPERTS[i] / temperature
        for i, (weight, temperature) in enumerate(
            zip(weights, temperatures, strict=True)
        )
    )
    expected = scipy.special.log_softmax(total, axis=-1)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    np.testing.assert_allclose(same, logits, atol=2e-5)


def test_the_fused_law_minimises_the_weighted_divergence_to_the_experts():
    experts, weights = EXPERTS[:, 0, 3].astype(np.float64), np.array([0.5, 0.3, 0.2])

    def objective(logits):
        log_q = scipy.special.log_softmax(logits)
        return (weights @ (np.exp(log_q) * (log_q - experts))).sum()

    def reverse(logits):
        log_q = scipy.special.log_softmax(logits)
        return (weights @ (np.exp(experts) * (experts - log_q))).sum()

    def minimise(function):
        found = scipy.optimize.minimize(function, np.zeros(VOCAB), tol=1e-12)
        return scipy.special.softmax(found.x)

    model = fuse_language_models([MODEL] * 3, fixed(weights.tolist()))
    logits, _ = extend(model)
    fused = np.exp(logits[0, 3])
    # The gradient of the objective vanishes quadratically: half of its digits count.
    np.testing.assert_allclose(minimise(objective), fused, atol=1e-4)
    assert np.abs(minimise(reverse) - fused).max() > 0.02
    linear, _ = _linear(weights).extend(
        PARAMS, TEXT, ALL_VALID, model.init_cache(3, 16)
    )
    np.testing.assert_allclose(minimise(reverse), np.exp(linear[0, 3]), atol=1e-4)


def _linear(weights):
    rule = rule_by_name("linear_pool", weights=weights.tolist())
    return fuse_language_models([MODEL] * 3, rule)


def test_prompt_rules_do_not_weigh_the_prompt_they_read():
    expected = read("uniform")["columns"][:, :-1]
    found = read("packllm_sim")["columns"]
    np.testing.assert_allclose(found[:, :-1], expected, atol=1e-6)
    assert np.abs(found[:, -1] - read("uniform")["columns"][:, -1]).max() > 0.1


def test_evidence_of_the_prompt_is_what_reading_it_gives():
    rule = RULES["evidence"]()
    model = fuse_language_models(MODEL, rule, num_models=3)
    columns, after = compiled(model.extend)(
        STACK, TEXT[:, :PROMPT], ALL_VALID[:, :PROMPT], model.init_cache(3, 16)
    )
    found = read("evidence")
    close((columns, after), (found["columns"], found["caches"][0]))
    assert np.abs(after.weights - 1 / 3).max() > 0.1


def test_bayes_rule_and_the_linear_pool_make_the_mixture():
    """``η = γ = 1``: texts have the law ``Σ_i p_i(text) / n``."""
    rule = evidence(1.0, 1.0, floor=-1e3, linear=True)
    model = fuse_language_models([MODEL] * 3, rule)
    logits, _ = extend(model)

    def score(log_probs):
        following = np.asarray(TEXT)[:, 1:, None]
        return np.take_along_axis(log_probs[:, :-1], following, -1).sum((-1, -2))

    each = np.stack([score(expert) for expert in EXPERTS])
    mixture = scipy.special.logsumexp(each, axis=0) - np.log(3)
    np.testing.assert_allclose(score(np.asarray(logits)), mixture, rtol=1e-4)
    other = fuse_language_models(
        [MODEL] * 3, evidence(1.0, 0.9, floor=-1e3, linear=True)
    )
    faded, _ = extend(other)
    assert np.abs(score(np.asarray(faded)) - mixture).max() > 0.01


def test_gradients_pass_a_veto():
    vetoing = {**PARAMS[0], "first": PARAMS[0]["first"].at[:, 2].set(-jnp.inf)}
    model = fuse_language_models([MODEL] * 3, uniform())

    def loss(params):
        cache = model.init_cache(3, 16)
        logits, _ = model.extend(params, TEXT, ALL_VALID, cache)
        return logits[..., 0].sum()

    gradient = compiled(jax.grad(loss))((vetoing, *PARAMS[1:]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_bfloat16_experts_are_pooled_in_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    model = fuse_language_models([MODEL] * 3, uniform())
    logits, after = extend(model, params)
    assert logits.dtype == after.log_probs.dtype == jnp.float32
    np.testing.assert_allclose(logits, _fused_uniform(), atol=0.1)


def _fused_uniform():
    found = read("uniform")
    return np.concatenate([found["columns"], found["extended"]], axis=1)


def test_sizes_are_those_of_the_experts():
    model = fuse_language_models([MODEL, table_model(VOCAB, 16)], uniform())
    assert (model.vocab_size, model.context_length) == (VOCAB, 16)


@pytest.mark.parametrize(
    ("models", "rule", "options", "message"),
    [
        ([], uniform(), {}, "got no models"),
        (MODEL, uniform(), {}, "num_models is None; with one model say how many"),
        (MODEL, uniform(), {"num_models": 0}, "num_models is 0"),
        ([MODEL] * 2, uniform(), {"num_models": 3}, "3 for 2 models"),
        ([MODEL] * 2, fixed([0.5, 0.3, 0.2]), {}, "3 weights for 2 experts"),
        (MODEL, fixed([1.0]), {"num_models": 2}, "1 weights for 2 experts"),
        (
            [MODEL] * 2,
            uniform(),
            {"temperatures": [1.0]},
            r"shape \(1,\), expected one for each of the 2",
        ),
        (
            [MODEL] * 2,
            uniform(),
            {"temperatures": [1.0, 0.0]},
            r"temperatures \[1.0, 0.0\], expected positive",
        ),
        ([MODEL] * 2, uniform(), {"temperatures": [1.0, np.nan]}, "expected positive"),
        (
            [MODEL, table_model(6)],
            uniform(),
            {},
            r"have \[5, 6\] tokens and no mapping was given",
        ),
    ],
)
def test_bad_input_is_named_with_the_fix(models, rule, options, message):
    with pytest.raises(ValueError, match=message):
        fuse_language_models(models, rule, **options)


def test_rules_that_do_not_fit_are_refused():
    deaf = evidence()._replace(needs_prompt=False)
    with pytest.raises(ValueError, match="does not ask for the prompt"):
        fuse_language_models([MODEL] * 2, deaf)
    short = memoryless(lambda log_probs: uniform_weights(log_probs)[:1])
    with pytest.raises(ValueError, match=r"shape \(1, 1\) for 2 experts"):
        fuse_language_models([MODEL] * 2, short)


def test_params_of_another_number_of_experts_are_refused():
    model = fuse_language_models([MODEL] * 2, uniform())
    with pytest.raises(
        ValueError, match="tuple of 3 experts, expected the tuple of the 2"
    ):
        model.step(PARAMS, TEXT[:, 0], model.init_cache(3, 8))
    stack = fuse_language_models(MODEL, uniform(), num_models=2)
    with pytest.raises(ValueError, match=r"first axes \[\(3,\)\], expected a stack of"):
        stack.step(STACK, TEXT[:, 0], stack.init_cache(3, 8))


def test_rules_have_the_signatures_they_promise():
    for make in RULES.values():
        rule = make()
        assert isinstance(rule, FusionRule)
        names = list(inspect.signature(rule.init).parameters)
        assert names == ["log_probs", "tokens", "valid"]
