"""The study of language-model fusion runs, resumes, and measures what it says."""

import itertools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _llm_rules as rules
from benchmarks import _llm_tables as tables
from benchmarks import _llm_texts as texts
from benchmarks import llm_study
from emfuse_jax.evaluation.language import token_log_probs
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.tree import stack
from experiments._lm import Window
from experiments._run import run_main
from llm._table_model import table_model, table_params

EVIDENCE = ("evidence", (("rate", 0.5), ("decay", 0.9)))
SIM = ("packllm_sim", (("temperature", 0.1),))


@pytest.fixture(scope="module")
def laws():
    """Three experts, what each says of two texts, and the texts."""
    model = table_model(7)
    experts = [table_params(seed, 7) for seed in range(3)]
    tokens = jax.random.randint(jax.random.key(9), (2, 12), 0, 7)
    every = jnp.ones(tokens.shape, bool)
    read = jax.jit(
        lambda p: model.prefill(p, tokens, every, model.init_cache(2, 12))[0]
    )
    rows = jnp.stack([read(params) for params in experts])
    return model, experts, jax.nn.log_softmax(rows, axis=-1), tokens


@pytest.mark.parametrize("rule", [EVIDENCE, SIM])
def test_a_rule_scores_replayed_laws_as_it_scores_models(laws, rule):
    model, experts, table, tokens = laws
    fused = fuse_language_models(model, rules.make_rule(*rule), num_models=3)
    every = jnp.ones((2, 12), bool)

    @jax.jit
    def expected(params, tokens):
        parts = tokens[:, :4], every[:, :4], tokens[:, 4:], every[:, 4:]
        return token_log_probs(params, fused, *parts).log_probs

    found = rules.scorer(*rule)(table, tokens, 4)
    reference = expected(stack(experts), tokens)
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)
    other = rules.scorer("linear_pool", ())(table, tokens, 4)
    assert float(jnp.max(jnp.abs(other - found))) > 0.05


def test_switching_is_the_law_of_its_hidden_markov_model(laws):
    """All paths of experts through six tokens, weighed and added up."""
    _, _, table, tokens = laws
    switch, row = 0.3, 0
    said = np.asarray(table)[:, row, :5][:, range(5), np.asarray(tokens)[row, 1:6]]
    total = np.zeros(5)
    for path in itertools.product(range(3), repeat=5):
        prior = 1 / 3
        for before, after in itertools.pairwise(path):
            prior *= switch / 3 + (1 - switch) * (before == after)
        likelihood = np.cumprod([np.exp(said[i, t]) for t, i in enumerate(path)])
        total += prior * likelihood
    expected = np.log(total) - np.log(np.concatenate([[1.0], total[:-1]]))
    options = (("rate", 1.0), ("switch", switch), ("linear", True))
    score = rules.scorer("switching", options)
    found = score(table[:, :, :6], tokens[:, :6], 2)[row]
    np.testing.assert_allclose(found, expected[1:], rtol=1e-4)
    stays = score(table[:, :, :6], tokens[:, :6], 2) - rules.scorer(
        "switching", (("rate", 1.0), ("switch", 0.01), ("linear", True))
    )(table[:, :, :6], tokens[:, :6], 2)
    assert float(jnp.max(jnp.abs(stays))) > 1e-3


def test_a_rolling_rule_is_estimated_on_the_last_tokens(laws):
    _, _, table, tokens = laws
    score = rules.scorer(*SIM)
    found = rules.rolling(score, 2)(table, tokens, 4)
    np.testing.assert_allclose(found[:, :2], score(table, tokens, 4)[:, :2], rtol=1e-4)
    part = score(table[:, :, 4:10], tokens[:, 4:10], 4)
    np.testing.assert_allclose(found[:, 4:6], part, rtol=1e-4)
    late = score(table, tokens, 4)[:, 4:6]
    assert float(jnp.max(jnp.abs(late - part))) > 0.01  # once is not anew


def test_every_candidate_is_a_rule():
    for name, options in rules.FIXED.values():
        rules.make_rule(name, options)
    for name, candidates in rules.CHOSEN.values():
        assert len(set(candidates)) == len(candidates) > 1
        for options in candidates:
            rules.make_rule(name, options)
    assert set(rules.OURS) <= set(rules.CHOSEN)


def windows(domain, count, documents, length=8):
    return [
        Window(
            domains=(domain,),
            documents=(f"{domain}-{i % documents}",),
            starts=(0,),
            tokens=tuple(range(100 * i, 100 * i + length)),
            num_prompt=2,
            prompt="",
            continuation="",
            distractors=((i + 1) % count, (i + 2) % count),
        )
        for i in range(count)
    ]


def test_no_document_is_chosen_on_and_reported():
    own = windows("a", 20, documents=10)
    chosen, reported = texts.part_documents(own, 0.3)
    names = [{w.documents[0] for w in part} for part in (chosen, reported)]
    assert not names[0] & names[1]
    assert [len(part) for part in names] == [3, 7]
    assert len(chosen) + len(reported) == 20
    with pytest.raises(ValueError, match="give more files"):
        texts.part_documents(windows("a", 3, documents=1), 0.3)


def test_mixed_texts_take_turns_and_go_on_where_they_left():
    three = [windows(name, 6, documents=6) for name in "abc"]
    mixed = texts.mixed_texts(three, 2, 6)
    assert mixed.domain[0].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert mixed.domain[1].tolist() == [0, 0, 2, 2, 1, 1, 0, 0]
    assert mixed.tokens[0].tolist() == [0, 1, 0, 1, 0, 1, 2, 3]
    assert mixed.tokens[4][:2].tolist() == [400, 401]
    with pytest.raises(ValueError, match="try 2"):
        texts.mixed_texts(three, 3, 6)


def test_the_first_option_is_the_right_answer():
    own = windows("a", 4, documents=4)
    options = {"prompt": 2, "answer": 2, "starts": (0, 4)}
    asked = texts.questions(own[1:], own, 0, **options)
    assert asked.num_options == 3
    rows = asked.texts.tokens.reshape(6, 3, 4)
    right, *wrong = [[100, 101, 100 * i + 2, 100 * i + 3] for i in (1, 2, 3)]
    assert rows[0].tolist() == [right, *wrong]
    assert rows[1][:2].tolist() == [[104, 105, 106, 107], [104, 105, 206, 207]]
    assert asked.texts.units[:3] == ("a-1", "a-1", "a-2")


def test_intervals_cover_and_differences_are_paired():
    rng = np.random.default_rng(0)
    units = [f"document {i // 2}" for i in range(80)]
    size = rng.integers(50, 100, 80).astype(float)
    noise = np.repeat(rng.normal(size=40), 2)
    first = size * (2.0 + 0.5 * noise)
    found = tables.table(
        {
            "a": {
                "one": np.stack([first, first]),
                "two": np.stack([first + 0.1 * size] * 2),
            }
        },
        {"a": tables.Resamples(units, size, 0)},
        ["a"],
        against=["one"],
    )
    one = found["values"]["one"]["a"]
    assert one["estimate"] == pytest.approx(first.sum() / size.sum())
    assert one["seeds"] == pytest.approx([one["estimate"]] * 2)
    half = (one["high"] - one["low"]) / 2
    # Forty documents, not eighty windows: the closed form is half as wide again.
    assert half == pytest.approx(1.96 * 0.5 * noise.std() / np.sqrt(40), rel=0.2)
    difference = found["difference_to"]["one"]["two"]["a"]
    assert difference["estimate"] == pytest.approx(0.1)
    assert difference["high"] - difference["low"] < 1e-6 < half


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two tiny domains, run twice; fewer rules, for the compiler's sake."""
    folder = tmp_path_factory.mktemp("llm_study")
    draw = random.Random(0)
    for name, words in {"a": "alpha beta gamma delta", "b": "int void char"}.items():
        (folder / name).mkdir()
        for number in range(40):
            lines = (
                f"{' '.join(draw.choices(words.split(), k=6))} {draw.random()}"
                for _ in range(20)
            )
            (folder / name / f"{number}.txt").write_text("\n".join(lines))
    domains = ",".join(f"{name}={folder / name}" for name in "ab")
    argv = ["llm_study", "--smoke", f"--experts.domains={domains}", "--seeds=0"]
    argv += [f"--work={folder / 'work'}", f"--out={folder / 'study.json'}"]
    kept = ("emfuse", "packllm_sim, τ=0.1", "packllm_opt")
    tried = {"evidence": (EVIDENCE[0], [EVIDENCE[1], (("rate", 0.0),)])}
    documents = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "FIXED", {name: rules.FIXED[name] for name in kept})
        patch.setattr(rules, "CHOSEN", tried)
        patch.setattr(rules, "OURS", ("evidence",))
        for _ in range(2):
            assert run_main(llm_study.main, llm_study.LlmStudyConfig, argv) == 0
            documents.append(json.loads((folder / "study.json").read_text()))
            scores = folder / "work" / "scores" / "scratch-seed0.json"
            documents[-1]["written"] = scores.stat().st_mtime_ns
        wrong = run_main(
            llm_study.main, llm_study.LlmStudyConfig, [*argv, "--validation=0.5"]
        )
    return documents, wrong


def test_every_method_is_scored_in_both_regimes(study):
    (document, _), _ = study
    assert set(document["regimes"]) == {"shared", "scratch"}
    for name, regime in document["regimes"].items():
        values = regime["tables"]["bits_per_byte"]["values"]
        common = {"emfuse", "packllm_opt", "evidence", "ours", "soup", "soup, greedy"}
        common |= {"regmean", "generalist", "expert 0", "expert 1", "own_expert"}
        assert common <= set(values)
        assert ("base" in values) == (name == "shared")
        for row in values.values():
            for cell in row.values():
                assert cell["low"] <= cell["estimate"] <= cell["high"]
        own, others = values["own_expert"], (values["expert 0"], values["expert 1"])
        assert own["a"] == others[0]["a"]
        assert own["b"] == others[1]["b"]
        assert set(values["packllm_opt, re-estimated"]) == {"mixed"}
        accuracy = regime["tables"]["accuracy"]["values"]["emfuse"]["mean"]
        assert 0.0 <= accuracy["estimate"] <= 1.0


def test_ours_is_the_candidate_that_won_on_validation_text(study):
    (document, _), _ = study
    for regime in document["regimes"].values():
        chosen = regime["seeds"]["0"]["chosen"]
        assert chosen["ours"]["family"] == "evidence"
        tried = chosen["evidence"]["tried"]
        assert chosen["evidence"]["loss"] == min(row["loss"] for row in tried)
        assert len(tried) == 2


def test_divergences_stand_beside_the_choices(study):
    (document, _), _ = study
    seed = document["regimes"]["shared"]["seeds"]["0"]
    for name in ("a", "b", "mixed"):
        row = seed["choices"][name]
        assert 0 <= row["kl of the pool choice"] <= row["kl bound"]
        assert row["kl of the tournament choice"] <= row["kl bound"] + 1e-6
        assert len(row["kl of each expert"]) == 2
    along = seed["pool"]["a"]["nats per text"]
    assert along["kl bound"]["estimate"] >= along["kl of the pool choice"]["estimate"]


def test_it_resumes_and_refuses_other_settings(study):
    (first, second), wrong = study
    assert first["written"] == second["written"]
    assert first["regimes"] == second["regimes"]
    assert wrong == 2
