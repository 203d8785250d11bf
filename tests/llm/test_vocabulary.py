"""Vocabularies mapped onto one another: partners, masses, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.rules import evidence, fixed, uniform
from emfuse_jax.llm.vocabulary import (
    _edit_distances,
    _Nearest,
    align_vocabularies,
    check_same_vocabulary,
    map_log_probs,
    map_tokens,
    map_vocabulary,
)
from llm._table_model import table_model, table_params

REFERENCE = ["<s>", "▁the", "▁cat", "s", "▁catch", "ing"]
EXPERT = ["ing", "Ġthe", "Ġcat", "</s>", "s", "Ġzebra", "Ġcatching"]
mapped = functools.partial(map_vocabulary, min_exact=0.0)


def levenshtein(first, second):
    @functools.cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (first[i - 1] != second[j - 1]),
        )

    return distance(len(first), len(second))


words = st.text("abc", max_size=6)


@given(words, st.lists(words, min_size=1, max_size=8))
def test_nearest_is_the_least_edit_distance_and_then_the_lowest_id(word, others):
    distances = [levenshtein(word, other) for other in others]
    assert _Nearest(others)(word) == int(np.argmin(distances))
    same_length = [other for other in others if len(other) == len(others[0])]
    codes = np.array([[ord(c) for c in other] for other in same_length], int)
    found = _edit_distances(
        np.array([ord(c) for c in word], int),
        codes.reshape(len(same_length), len(others[0])),
    )
    assert found.tolist() == [levenshtein(word, other) for other in same_length]


def test_partners_are_equal_strings_then_other_markers_then_nearest():
    mapping = mapped(REFERENCE, EXPERT)
    partners = [EXPERT[i] for i in mapping.partner]
    assert partners == ["</s>", "Ġthe", "Ġcat", "s", "Ġcat", "ing"]
    assert mapping.exact_reference == pytest.approx(4 / 6)
    assert mapping.exact_expert == pytest.approx(4 / 7)
    assert [EXPERT[i] for i in mapping.orphans] == ["Ġzebra", "Ġcatching"]
    assert [REFERENCE[i] for i in mapping.adopted_by][1] == "▁catch"
    both = mapped(["Ġa", "▁a"], ["▁a", "Ġa"])
    assert both.partner.tolist() == [1, 0]


def test_pairs_count_as_exact():
    mapping = mapped(["<s>", "a"], ["a", "b", "<|begin|>"], pairs={"<s>": "<|begin|>"})
    assert mapping.partner.tolist() == [2, 0]
    assert mapping.exact_reference == 1.0
    assert mapped(["<s>", "a"], ["a", "b", "<|begin|>"]).partner.tolist() != [2, 0]


def test_masses_go_where_the_text_says():
    mapping = mapped(REFERENCE, EXPERT, share_inexact=0.25)
    probs = np.array([0.1, 0.2, 0.3, 0.05, 0.15, 0.08, 0.12])
    found = np.exp(map_log_probs(mapping, jnp.log(jnp.asarray(probs, jnp.float32))))
    zebra = mapping.adopted_by[0]
    expected = np.array([0.05, 0.2, 0.75 * 0.3, 0.15, 0.25 * 0.3 + 0.12, 0.1])
    expected[zebra] += 0.08
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Gathering, as is often done, counts the cat twice and forgets the zebra.
    assert abs(probs[mapping.partner].sum() - 1) > 0.05


@given(
    st.lists(words, min_size=1, max_size=7),
    st.lists(words, min_size=1, max_size=7),
    st.integers(0, 1000),
)
def test_mass_is_neither_made_nor_lost(reference, expert, seed):
    mapping = mapped(reference, expert)
    law = scipy.special.softmax(
        np.random.default_rng(seed).normal(size=len(expert)) * 3
    )
    # In numpy, so that not every pair of sizes is compiled.
    carried = law[mapping.partner] * np.exp(mapping.log_share)
    np.add.at(carried, mapping.adopted_by, law[mapping.orphans])
    assert carried.sum() == pytest.approx(1.0, abs=1e-5)
    assert (carried > 0).all()
    assert set(mapping.partner) | set(mapping.orphans) == set(range(len(expert)))


def test_mapped_laws_in_any_batch_shape_and_with_vetoes():
    mapping = mapped(REFERENCE, EXPERT)
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)) * 2
    logits[..., [2, 6]] = -np.inf
    laws = jnp.asarray(scipy.special.log_softmax(logits, -1), jnp.float32)
    found = jax.jit(functools.partial(map_log_probs, mapping))(laws)
    assert found.shape == (2, 3, 6)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1.0, atol=1e-5)
    # Both of its sources are impossible, and only then is a token.
    np.testing.assert_array_equal(
        found == -np.inf,
        (np.arange(6) == 2)[None, None]
        | ((np.arange(6) == 4)[None, None] & np.ones((2, 3, 1), bool)),
    )
    assert not np.isnan(found).any()


def test_a_mapping_too_lossy_is_refused_unless_asked_for():
    with pytest.raises(ValueError, match=r"4 of 6 reference tokens.*min_exact=0\.57"):
        map_vocabulary(REFERENCE, EXPERT)
    assert map_vocabulary(REFERENCE, EXPERT, min_exact=0.57).reference_size == 6
    with pytest.raises(ValueError, match="expert 1: 4 of 6"):
        align_vocabularies([REFERENCE, EXPERT])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: map_vocabulary([], ["a"]), "vocabularies of 0 and 1 tokens"),
        (
            lambda: map_vocabulary(["a"], ["a"], pairs={"b": "a"}),
            "names 'b', which the r",
        ),
        (
            lambda: map_vocabulary(["a"], ["a"], pairs={"a": "c"}),
            "names 'c', which the e",
        ),
        (lambda: map_vocabulary(["a"], ["a"], share_inexact=1.0), "share_inexact 1.0"),
        (lambda: align_vocabularies([["a"]], reference=1), "reference 1, expected"),
        (
            lambda: check_same_vocabulary([["a", "b"], ["a", "c"]]),
            "expert 1 differs.*token 1 is 'c' against 'b'.*align_vocabularies",
        ),
        (lambda: check_same_vocabulary([["a"], ["a", "c"]]), "2 tokens against 1"),
    ],
)
def test_bad_input_is_named_with_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


TOKENS = ["a", "b", "▁c", "d", "e"]
ORDER = np.array([3, 0, 4, 1, 2])
"""The second expert's id of each token."""


def permuted(params):
    """The same tables with the tokens numbered in another way, and two rows of padding."""
    inverse = np.argsort(ORDER)

    def table(leaf):
        moved = leaf[inverse][:, inverse]
        return jnp.pad(moved, ((0, 2), (0, 2)), constant_values=5.0)

    return {name: table(leaf) for name, leaf in params.items()}


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, tokens):
    valid = jnp.ones(tokens.shape, bool)
    cache = model.init_cache(len(tokens), 16)
    first, cache = model.prefill(params, tokens[:, :3], valid[:, :3], cache)
    rest, cache = model.extend(params, tokens[:, 3:], valid[:, 3:], cache)
    last, _ = model.step(params, tokens[:, 0], cache)
    return jnp.concatenate([first, rest, last[:, None]], axis=1)


def test_a_renumbered_expert_is_the_same_expert():
    first, second = table_params(0, 5), table_params(1, 5)
    theirs = [""] * 5
    for token, index in zip(TOKENS, ORDER, strict=True):
        theirs[index] = token.replace("▁", "Ġ")
    maps = align_vocabularies([TOKENS, theirs])
    assert maps[0].identity
    assert not maps[1].identity
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 5)
    np.testing.assert_array_equal(map_tokens(maps[1], tokens), ORDER[tokens])
    small, padded = table_model(5), table_model(7)
    rule = evidence()
    plain = fuse_language_models([small, small], rule)
    model = fuse_language_models([small, padded], rule, vocabulary=maps)
    assert model.vocab_size == 5
    expected = read(plain, (first, second), tokens)
    found = read(model, (first, permuted(second)), tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_stack_takes_maps_too_and_temperatures():
    params = table_params(1, 5)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    maps = align_vocabularies([TOKENS[:4], TOKENS[:4]])
    options = {"vocabulary": maps, "temperatures": [1.0, 2.0]}
    model = fuse_language_models(table_model(5), uniform(), num_models=2, **options)
    tokens = jnp.array([[0, 3, 1, 2]])
    found = read(model, stack, tokens)
    # Twice the logits at twice the temperature; the padded token is cut off.
    alone = fuse_language_models([table_model(5)], fixed([1.0]))
    expected = jax.nn.log_softmax(read(alone, (params,), tokens)[..., :4])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_maps_have_to_fit_the_models():
    maps = align_vocabularies([REFERENCE, EXPERT], min_exact=0.0)
    six, seven = table_model(6), table_model(7)
    fuse_language_models([six, seven], uniform(), vocabulary=maps)
    text = "map of expert 0 is for 7 tokens, the model has 6; .* embedding"
    with pytest.raises(ValueError, match=text):
        fuse_language_models([six, six], uniform(), vocabulary=maps[::-1])
    with pytest.raises(ValueError, match="has 1 maps, expected one for each of the 2"):
        fuse_language_models([six, seven], uniform(), vocabulary=maps[:1])
    mixed = (maps[0], mapped(EXPERT, EXPERT))
    with pytest.raises(ValueError, match=r"lead to \[6, 7\] tokens"):
        fuse_language_models([six, seven], uniform(), vocabulary=mixed)
