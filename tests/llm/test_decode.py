import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _lm_models import TINY, random_params, random_tokens
from _standard_errors import assert_mean_close
from _table_lm import scripted_params, table_law, table_lm, table_params, table_scores
from emfuse_jax.llm import language_model, logits
from emfuse_jax.llm.decode import (
    bucket_length,
    check_prompt,
    decode_tokens,
    generate,
    pad_left,
    start_decoding,
)
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.rules import uniform

VOCAB = 6
MODEL = table_lm(VOCAB)
PROMPTS = [[3], [1, 2, 3, 4, 5, 0, 1], [5, 5], [0, 4, 2, 2]]


@pytest.fixture(scope="module")
def params():
    return table_params(jax.random.key(7), VOCAB)


@functools.cache
def compiled(num_tokens=8, model=MODEL, **options):
    return jax.jit(
        lambda params, key, tokens, valid: generate(
            params, key, model, tokens, valid, num_tokens, **options
        )
    )


def test_greedy_decoding_is_the_argmax_of_the_law_at_every_token(params):
    found = compiled(temperature=0.0)(params, jax.random.key(0), *pad_left(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for _ in range(8):
            text.append(int(np.argmax(table_law(params, text))))
        new = text[len(prompt) :]
        assert found.tokens[row].tolist() == new
        np.testing.assert_allclose(
            found.log_probs[row], table_scores(params, prompt, new), rtol=1e-4
        )
    assert found.valid.all()
    assert found.kept is None
    # The rows differ, so that a mix-up would be seen.
    assert len({tuple(row) for row in found.tokens.tolist()}) == len(PROMPTS)


def test_a_batch_with_padding_decodes_as_each_prompt_alone(params):
    key = jax.random.key(1)
    together = compiled(top_k=5)(params, key, *pad_left(PROMPTS, length=13))
    for row, prompt in enumerate(PROMPTS):
        own_key = jax.random.fold_in(key, row)[None]
        alone = compiled(top_k=5)(params, own_key, *pad_left([prompt], length=7))
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()
        np.testing.assert_allclose(
            alone.log_probs[0], together.log_probs[row], rtol=1e-5
        )
    other = compiled(top_k=5)(params, jax.random.key(2), *pad_left(PROMPTS, length=13))
    assert (np.asarray(other.tokens) != np.asarray(together.tokens)).any()


def test_chunks_equal_one_scan_bit_for_bit(params):
    key, prompts = jax.random.key(3), pad_left(PROMPTS)
    options = dict(temperature=0.9, top_p=0.95, stop_tokens=(4,))

    def keep(cache):
        return cache.count

    whole = compiled(8, **options, keep=keep)(params, key, *prompts)
    start = jax.jit(lambda p, *arrays: start_decoding(p, MODEL, *arrays, 8))
    state, parts = start(params, *prompts), []
    for size in (3, 5):
        advance = jax.jit(
            lambda p, k, s, n=size: decode_tokens(
                p, k, MODEL, s, n, **options, keep=keep
            )
        )
        state, part = advance(params, key, state)
        parts.append(part)
    for field in ("tokens", "valid", "log_probs"):
        joined = np.concatenate([getattr(part, field) for part in parts], axis=1)
        np.testing.assert_array_equal(joined, getattr(whole, field))
    kept = np.concatenate([part.kept for part in parts], axis=0)
    np.testing.assert_array_equal(kept, whole.kept)
    assert int(state.step) == 8


def test_texts_are_drawn_as_often_as_the_law_says():
    params = table_params(jax.random.key(8), 3, scale=1.0)
    rows, model = 6000, table_lm(3)
    draw = compiled(2, model=model, temperature=0.8)
    tokens, valid = pad_left([[2, 1]], length=2)
    found = draw(
        params,
        jax.random.key(4),
        jnp.tile(tokens, (rows, 1)),
        jnp.tile(valid, (rows, 1)),
    )

    def tempered(prefix):
        law = np.exp(table_law(params, prefix) / 0.8)
        return law / law.sum()

    first = tempered([2, 1])
    joint = np.array([first[a] * tempered([2, 1, a]) for a in range(3)]).ravel()
    index = np.asarray(found.tokens) @ [3, 1]
    error = assert_mean_close(
        np.eye(9)[index], joint, std=np.sqrt(joint * (1 - joint)), sigmas=4.5
    )
    # Seen through: the law at temperature one, and a second token that ignores the first.
    plain = np.array(
        [
            np.exp(table_scores(params, [2, 1], [a, b]).sum())
            for a in range(3)
            for b in range(3)
        ]
    )
    assert (np.abs(plain - joint) > 5 * error).any()
    marginal = joint.reshape(3, 3).sum(0)
    assert (np.abs(np.outer(first, marginal).ravel() - joint) > 5 * error).any()
    # Log-probabilities are the model's own all the same.
    scores = [
        table_scores(params, [2, 1], row).tolist() for row in found.tokens[:5].tolist()
    ]
    np.testing.assert_allclose(found.log_probs[:5], scores, rtol=1e-4)


def test_a_stop_token_freezes_its_row_and_no_other():
    script = [1, 2, 3, 4, 5, 0]
    params = scripted_params(script, VOCAB, start=2)
    # The second row is one token further in the script.
    prompts = pad_left([[0, 0], [0, 0, 0]])
    free = compiled(5, temperature=0.0)(params, jax.random.key(0), *prompts)
    assert free.tokens.tolist() == [[1, 2, 3, 4, 5], [2, 3, 4, 5, 0]]
    found = compiled(5, temperature=0.0, stop_tokens=(4, 1))(
        params, jax.random.key(0), *prompts
    )
    assert found.tokens.tolist() == [[1, 1, 1, 1, 1], [2, 3, 4, 4, 4]]
    assert found.valid.astype(int).tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_keep_sees_the_cache_that_predicts_the_token_at_hand(params):
    def keep(cache):
        return {"read": cache.count, "last": cache.last}

    found = compiled(4, temperature=0.0, keep=keep)(
        params, jax.random.key(0), *pad_left(PROMPTS)
    )
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    np.testing.assert_array_equal(
        found.kept["read"], lengths[None] + np.arange(4)[:, None]
    )
    before = np.column_stack([[p[-1] for p in PROMPTS], found.tokens[:, :-1]])
    np.testing.assert_array_equal(found.kept["last"], before.T)


def test_the_cache_has_room_for_the_prompt_and_every_new_token(params):
    tokens, valid = pad_left(PROMPTS)

    @jax.jit
    def run(params, tokens, valid):
        state = start_decoding(params, MODEL, tokens, valid, 8)
        return decode_tokens(params, jax.random.key(0), MODEL, state, 8)

    state, found = run(params, tokens, valid)
    assert state.cache.tokens.shape[1] == tokens.shape[1] + 8
    assert int(state.cache.column) == state.cache.tokens.shape[1]
    np.testing.assert_array_equal(state.cache.tokens[:, -8:], found.tokens)
    prompt = np.where(valid, tokens, -1)
    np.testing.assert_array_equal(state.cache.tokens[:, :-8], prompt)


def test_one_program_serves_every_prompt_of_a_bucket(params):
    traces = {}
    model = table_lm(VOCAB, traces=traces)
    run = compiled(4, model=model)
    for prompts in ([[1]], [[1] * 9], [[2] * 16]):
        run(params, jax.random.key(0), *pad_left(prompts))
    assert traces == {"prefill": 1, "step": 1}
    run(params, jax.random.key(0), *pad_left([[1] * 17]))
    assert traces == {"prefill": 2, "step": 2}


def test_where_every_token_is_impossible_nothing_is_nan():
    params = scripted_params([1, 1, 1], VOCAB, start=1)
    params["position"] = params["position"].at[2].set(-jnp.inf)
    found = compiled(3, temperature=0.0)(params, jax.random.key(0), *pad_left([[0]]))
    assert found.tokens.tolist() == [[1, 0, 1]]
    assert np.isneginf(found.log_probs[0, 1])
    assert np.isfinite(found.log_probs[0, 2])


def test_fused_transformers_decode_the_argmax_of_the_pool_of_their_uncached_laws():
    experts = [random_params(TINY, seed) for seed in (0, 1)]
    model = fuse_language_models([language_model(TINY)] * 2, uniform())
    prompts = [random_tokens(i, (size,)).tolist() for i, size in enumerate((3, 9))]
    found = compiled(6, model=model, temperature=0.0)(
        tuple(experts), jax.random.key(0), *pad_left(prompts)
    )
    texts = [p + new for p, new in zip(prompts, found.tokens.tolist(), strict=True)]
    padded = jnp.array([text + [0] * (15 - len(text)) for text in texts])
    read = jax.jit(lambda p: jax.nn.log_softmax(logits(TINY, p, padded, padded >= 0)))
    pooled = np.mean([read(params) for params in experts], axis=0)
    for row, prompt in enumerate(prompts):
        columns = pooled[row, len(prompt) - 1 : len(prompt) + 5]
        assert np.argmax(columns, axis=-1).tolist() == found.tokens[row].tolist()
        expected = jnp.max(jax.nn.log_softmax(columns), axis=-1)
        np.testing.assert_allclose(found.log_probs[row], expected, rtol=1e-3)


def test_buckets_are_powers_of_two_within_bounds():
    assert [bucket_length(n) for n in (0, 1, 16, 17, 33, 1024)] == [
        *(16, 16, 16, 32, 64, 1024)
    ]
    assert [bucket_length(n, minimum=4, maximum=100) for n in (3, 5, 65, 100)] == [
        *(4, 8, 100, 100)
    ]
    with pytest.raises(ValueError, match="101 tokens do not fit into 100"):
        bucket_length(101, maximum=100)


def test_padding_is_on_the_left_and_marked():
    tokens, valid = pad_left([[7, 8, 9], [4]], pad_token=5, length=4)
    assert tokens.tolist() == [[5, 7, 8, 9], [5, 5, 5, 4]]
    assert valid.astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert pad_left([[1] * 20])[0].shape == (1, 32)
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        pad_left([[1, 2, 3]], length=2)


def test_bad_prompts_are_named():
    def check(prompts, new_tokens=4, **options):
        check_prompt(MODEL, *pad_left(prompts, **options), new_tokens)

    check([[1] * 60])
    with pytest.raises(ValueError, match="prompt 1 is empty; give it one token"):
        check([[1], []])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        check([[]], length=0)
    with pytest.raises(ValueError, match="no prompt"):
        check([])
    with pytest.raises(
        ValueError, match=r"prompt 1 has 61 tokens and 4 more.* 64; cut"
    ):
        check([[1], [1] * 61])
    with pytest.raises(ValueError, match="ask for fewer new tokens"):
        check([[1]], 64)
    with pytest.raises(ValueError, match=r"prompt 1 holds token 6, .* 0 … 5"):
        check([[1], [0, 6]])
    check([[1], [5]], pad_token=99)  # padding is not looked at
    tokens, valid = pad_left([[1, 2]], length=3)
    with pytest.raises(ValueError, match="prompt 0 ends in padding"):
        check_prompt(MODEL, tokens[:, ::-1], valid[:, ::-1], 4)


def test_bad_options_are_refused_before_anything_runs(params):
    prompts = pad_left([[1]])
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(params, jax.random.key(0), MODEL, *prompts, 0)
    with pytest.raises(ValueError, match="stop token 6"):
        generate(params, jax.random.key(0), MODEL, *prompts, 2, stop_tokens=[6])
    with pytest.raises(ValueError, match=r"top_p=0"):
        generate(params, jax.random.key(0), MODEL, *prompts, 2, top_p=0.0)
    with pytest.raises(ValueError, match="prompt 0 has 1 tokens"):
        generate(params, jax.random.key(0), MODEL, *prompts, 64)
