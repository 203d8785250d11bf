"""Merging real models, tiny: an any-step dynamics model and a Llama."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _tiny_runs as tiny
from emfuse_jax.base import SpaceSpec
from emfuse_jax.data import gather_history, make_dataset
from emfuse_jax.dynamics import (
    AdetmConfig,
    EnsembleConfig,
    adetm,
    fit_scales,
    gaussian_ensemble,
    make_slices,
)
from emfuse_jax.llm import (
    LINEAR_INPUTS,
    LmConfig,
    RopeConfig,
    apply_layer,
    embed_tokens,
    init_params,
    logits,
)
from emfuse_jax.merging import (
    Stage,
    collect_grams,
    flax_grams,
    gram_memory,
    merge_linear,
    model_soup,
    regmean,
    regmean_streamed,
)
from emfuse_jax.merging.soup import named_leaves

ROWS, LAGS = 32, 3
SPEC = SpaceSpec(4, 2)


@pytest.fixture(scope="module")
def batches():
    """Histories without padding from two domains, and what followed."""
    found = []
    for seed in range(2):
        dataset = make_dataset(
            **tiny.arrays(rows=80, observation=4, action=2, seed=seed)
        )
        rows = np.flatnonzero(dataset.age >= LAGS - 1)[:ROWS]
        history = gather_history(dataset, rows, LAGS)
        found.append((dataset, history, jnp.asarray(dataset.reward[rows])))
    return found


@pytest.fixture(scope="module")
def models(batches):
    """Two experts' parameters, and the functions of both."""
    config = AdetmConfig(
        num_lags=LAGS,
        energy_sizes=(8, 6),
        head_sizes=(7,),
        state_features=6,
        action_features=4,
        num_heads=2,
        batch_size=8,
        energy_rows=8,
    )
    dynamics = adetm(config, SPEC)
    init = jax.jit(dynamics.init)
    scales = [fit_scales(dataset, LAGS) for dataset, _, _ in batches]
    keys = jax.random.split(jax.random.key(0), 2)
    return dynamics, [init(k, s).params for k, s in zip(keys, scales, strict=True)]


def run_layers(expert):
    def run(params, history):
        slices = make_slices(history, expert.anchor)
        encoded = expert.encode(params, slices)
        condition = expert.prepare(params, encoded)
        return expert.energy(params, condition, encoded.start + encoded.scale)

    return run


@pytest.fixture(scope="module")
def grams(models, batches):
    dynamics, params = models
    measure = jax.jit(lambda p, h: flax_grams(run_layers(dynamics.model.expert), p, h))
    return [measure(p, b[1]) for p, b in zip(params, batches, strict=True)]


def test_every_kernel_of_a_dynamics_model_has_a_gram(models, grams):
    _, (params, _) = models
    leaves = named_leaves(params)
    assert set(grams[0]) == {name for name in leaves if name.endswith("kernel")}
    # States are read once per slice; the tokens of actions once for all slices.
    rows = {name: int(gram.num_rows) for name, gram in grams[0].items()}
    assert rows["encoder.params.state_0.kernel"] == LAGS * ROWS
    assert rows["encoder.params.action.token.kernel"] == LAGS * ROWS
    assert rows["encoder.params.action.attention.query.kernel"] == ROWS
    assert rows["head.params.last_fc.kernel"] == LAGS * ROWS
    assert rows["energy.params.condition_layer.kernel"] == LAGS * ROWS
    for name, gram in grams[0].items():
        total = np.asarray(gram.total)
        np.testing.assert_allclose(total, total.T, rtol=1e-5, atol=1e-5)
        assert np.linalg.eigvalsh(total).min() > -1e-3 * np.trace(total), name


def test_the_gram_of_the_first_layer_is_that_of_its_inputs(models, grams, batches):
    """By hand: normalised states of every slice, and which slice it is."""
    dynamics, (params, _) = models
    anchor = make_slices(batches[0][1], dynamics.model.expert.anchor).anchor
    scales = params.scales.observation
    state = (np.asarray(anchor) - np.asarray(scales.mean)) / np.asarray(scales.scale)
    which = np.broadcast_to(np.eye(LAGS)[:, None], (LAGS, ROWS, LAGS))
    rows = np.concatenate([state, which], axis=-1).reshape(LAGS * ROWS, -1)
    found = grams[0]["encoder.params.state_0.kernel"].total
    np.testing.assert_allclose(found, rows.T @ rows, rtol=1e-4, atol=1e-3)


def test_regmean_of_dynamics_models_is_a_dynamics_model(models, grams, batches):
    dynamics, params = models
    merged = regmean(params, grams, ridge=1e-6)
    assert jax.tree.structure(merged) == jax.tree.structure(params[0])
    predicted = jax.jit(dynamics.model.predict)(
        merged, jax.random.key(0), batches[0][1]
    )
    assert jnp.isfinite(predicted.next_observation).all()
    name = "head.params.fc0.kernel"
    kernels = [named_leaves(p)[name] for p in params]
    means = [g[name].total / g[name].num_rows for g in grams]
    expected = merge_linear(kernels, means, ridge=1e-6)
    found = named_leaves(merged)[name]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(found - named_leaves(model_soup(params))[name]).max() > 0.01
    # One expert given twice is that expert, whatever its Grams.
    again = regmean([params[0]] * 2, grams, ridge=1e-6)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_dynamics_models_of_other_sizes_are_refused(models, batches):
    _, params = models
    other = adetm(AdetmConfig(num_lags=LAGS, energy_sizes=(8,)), SPEC)
    shapes = jax.eval_shape(other.init, jax.random.key(0), params[0].scales)
    wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.params)
    with pytest.raises(ValueError, match=r"leaf encoder\..* is \[4, 8\] in model 1"):
        model_soup([params[0], wide])


def test_members_of_an_ensemble_have_grams_of_their_own(batches):
    ensemble = gaussian_ensemble(EnsembleConfig(num_members=2, hidden_sizes=(5,)), SPEC)
    dataset, history, reward = batches[0]
    params = jax.jit(ensemble.init)(jax.random.key(0), fit_scales(dataset, 1)).params
    measure = jax.jit(lambda *args: flax_grams(ensemble.model.energy, *args))
    found = measure(params, history, history.observation[0], reward)
    assert found["members.params.fc0.kernel"].total.shape == (2, 6, 6)
    assert found["members.params.last_fc.kernel"].num_rows.tolist() == [ROWS] * 2


LM = LmConfig(
    vocab_size=13,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=12,
    rope=RopeConfig(theta=100.0),
    tied=True,
)


@jax.jit
def lm_layer(params, carry):
    hidden, valid = carry
    hidden, inputs = apply_layer(LM, params, hidden, valid)
    return (hidden, valid), {name: (x, valid) for name, x in inputs.items()}


LM_STAGES = [
    Stage(("layers", i), lm_layer, LINEAR_INPUTS) for i in range(LM.num_layers)
]


def carry_of(params, tokens, valid):
    return embed_tokens(params, tokens), valid


@pytest.fixture(scope="module")
def llamas():
    init = jax.jit(lambda key: init_params(key, LM))
    params = [init(key) for key in jax.random.split(jax.random.key(1), 2)]
    rng = np.random.default_rng(0)
    tokens = [jnp.asarray(rng.integers(0, 13, (4, 10)), jnp.int32) for _ in range(2)]
    return params, tokens


def test_padding_of_a_language_model_counts_nothing(llamas):
    (params, _), (tokens, _) = llamas
    whole = jnp.ones(tokens.shape, bool)
    plain = list(collect_grams(LM_STAGES, params, [carry_of(params, tokens, whole)]))
    wide = jnp.pad(tokens, ((0, 2), (3, 2)), constant_values=5)
    valid = jnp.pad(whole, ((0, 2), (3, 2)))
    padded = list(collect_grams(LM_STAGES, params, [carry_of(params, wide, valid)]))
    unmasked = list(
        collect_grams(LM_STAGES, params, [carry_of(params, wide, jnp.ones_like(valid))])
    )
    for stage in range(LM.num_layers):
        for name, own in plain[stage].items():
            other = padded[stage][name]
            assert float(own.num_rows) == float(other.num_rows) == 40
            np.testing.assert_allclose(own.total, other.total, rtol=1e-4, atol=1e-4)
            assert not np.allclose(own.total, unmasked[stage][name].total, rtol=0.1)


def test_regmean_of_language_models(llamas):
    params, tokens = llamas
    whole = jnp.ones(tokens[0].shape, bool)
    carries = [[carry_of(p, t, whole)] for p, t in zip(params, tokens, strict=True)]
    merged = regmean_streamed(params, LM_STAGES, carries)
    soup = model_soup(params)
    score = jax.jit(lambda p: logits(LM, p, tokens[0], whole))
    assert jnp.isfinite(score(merged)).all()
    # Kernels of layers are fitted; norms and the tied embedding are the mean.
    leaves, means = named_leaves(merged), named_leaves(soup)
    changed = {n for n in leaves if not np.allclose(leaves[n], means[n], atol=1e-4)}
    assert changed == {f"layers.{i}.{name}" for i in range(2) for name in LINEAR_INPUTS}
    again = regmean_streamed([params[0]] * 2, LM_STAGES, [carries[0], carries[1]])
    np.testing.assert_allclose(score(again), score(params[0]), rtol=1e-4, atol=1e-5)
    # Four tokens are too few for the widest layer.
    few = [
        [carry_of(p, t[:1, :4], whole[:1, :4])]
        for p, t in zip(params, tokens, strict=True)
    ]
    with pytest.raises(
        ValueError, match=r"layers\.0\.\w+ in model 0 was measured on 4 rows"
    ):
        regmean_streamed(params, LM_STAGES, few)


def test_memory_of_a_language_model_is_stated(llamas):
    (params, _), (tokens, _) = llamas
    carry = carry_of(params, tokens, jnp.ones(tokens.shape, bool))
    stated = gram_memory(LM_STAGES, params, [carry] * 3)
    assert stated.largest == 4 * (3 * (8 * 8 + 1) + 12 * 12 + 1)
    assert stated.total == 2 * stated.largest
    assert stated.carries == 3 * (4 * 10 * 8 * 4 + 4 * 10)
    assert stated.widest == 12
