"""fuse_llm: what it writes is what the fused law says; what it cannot do it refuses."""

import functools
import io
import re
import shutil
import sys

import jax
import numpy as np
import pytest

import _tiny_lms as tiny
import _tiny_runs
from emfuse_jax import artifacts
from emfuse_jax.evaluation.scoring import compile_scorer, score_continuations
from emfuse_jax.llm.config import LmConfig
from emfuse_jax.llm.model import logits
from emfuse_jax.llm.tokenizer import ByteTokenizer
from emfuse_jax.llm.weights import load_language_model
from experiments import _lm, _lm_chat, _lm_experts, _lm_score, fuse_llm
from experiments._lm_rules import parse_rules

RULES = ("emselect:order=pool", "packllm_opt", "evidence:rate=0.3:linear=true")


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
    monkeypatch.setenv("EMFUSE_JAX_CACHE", "0")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A finished run of tiny models; do not write here."""
    return tiny.write_run(tmp_path_factory.mktemp("lm") / "run")


@pytest.fixture(scope="module")
def experts(lm):
    return _lm_experts.open_experts([str(lm)])


@pytest.fixture(scope="module")
def fused(lm, tmp_path_factory):
    """One run of each kind, made once."""
    root = tmp_path_factory.mktemp("fused")
    call(
        f"--experts={lm}",
        "--rule=emfuse,emselect,evidence",
        "--prompt=def self",
        "--sampling.max_new_tokens=11",
        f"--run_dir={root}/text",
    )
    call(
        f"--experts={lm}",
        f"--score={lm}",
        "--rule=emfuse,packllm_opt",
        f"--scoring.models={lm}/models/generalist",
        *("--scoring.choices=true", "--scoring.baseline=emfuse", "--scoring.drawn=6"),
        *("--scoring.drawn_tokens=5", "--scoring.num_resamples=200"),
        f"--run_dir={root}/scores",
    )
    return root


def call(*flags, status=0):
    assert fuse_llm.main(["fuse_llm", *map(str, flags)]) == status


@functools.partial(jax.jit, static_argnames="config")
def padded_law(params, tokens, valid, config):
    return jax.nn.log_softmax(logits(config, params, tokens, valid), axis=-1)


def law(params, tokens, config=tiny.CONFIG):
    """Log-probabilities of what follows each token, without a cache."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    valid = np.arange(32)[None] < len(tokens)
    return np.asarray(padded_law(params, padded, valid, config))[0, : len(tokens)]


def normalised(scores):
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)


def read(path):
    return artifacts.read_json(path)


def test_greedy_text_follows_the_pool(fused, experts):
    (passage, *_) = read(fused / "text" / "result.json")["passages"]
    tokens = ByteTokenizer().encode("def self", special=True)
    for token, log_prob, own, apart in zip(
        *(
            passage[k]
            for k in ("tokens", "log_probs", "expert_log_probs", "divergence")
        ),
        strict=True,
    ):
        laws = np.stack([law(params, tokens)[-1] for params in experts.params])
        pool = normalised(laws.mean(0))
        assert token == int(pool.argmax())
        assert log_prob == pytest.approx(float(pool[token]), abs=1e-4)
        np.testing.assert_allclose(own, laws[:, token], atol=1e-4)
        gap = np.sum(np.exp(pool) * (pool - laws), axis=-1)
        np.testing.assert_allclose(apart, gap, atol=1e-4)
        assert abs(apart[0] - apart[1]) > 1e-3  # else the order would not be tested
        tokens.append(token)
    assert passage["finish"] == "length"
    assert "".join(passage["token_texts"]) == passage["text"]


def test_a_selection_has_all_the_weight_and_keeps_below_its_bound(fused):
    passages = read(fused / "text" / "result.json")["passages"]
    assert [p["rule"] for p in passages] == ["emfuse", "emselect", "evidence"]
    weights = np.array(passages[1]["weights"])
    assert set(weights.ravel()) == {0.0, 1.0}
    apart = np.array(passages[1]["divergence"])
    chosen = np.take_along_axis(apart, weights.argmax(1)[:, None], 1)[:, 0]
    assert (chosen > 0).all()
    assert (chosen <= apart.max(1)).all()
    online = np.array(passages[2]["weights"])
    np.testing.assert_allclose(online.sum(1), 1.0, rtol=1e-5)
    assert np.ptp(online[:, 0]) > 1e-3
    page = (fused / "text" / "text.html").read_text()
    assert page.count("<section>") == 3
    assert "http" not in page
    assert "py: weight" in page


def test_a_finished_run_is_not_decoded_again(fused, lm, monkeypatch, capsys):
    before = read(fused / "text" / "result.json")
    monkeypatch.setattr(fuse_llm, "decode_passage", None)
    call(
        f"--experts={lm}",
        "--rule=emfuse,emselect,evidence",
        "--prompt=def self",
        "--sampling.max_new_tokens=11",
        f"--run_dir={fused}/text",
    )
    assert read(fused / "text" / "result.json") == before
    # With another prompt it is another run.
    call(f"--experts={lm}", "--prompt=x", f"--run_dir={fused}/text", status=2)
    assert "prompt" in capsys.readouterr().err


def test_scores_are_those_of_the_models(fused, lm, experts):
    result = read(fused / "scores" / "result.json")
    windows = _lm.read_prepared(lm / "text").windows
    assert list(result["bits_per_byte"]) == ["py", "man", "mixed", "mean"]
    generalist = load_language_model(lm / "models" / "generalist").params
    every = dict(zip(experts.names, experts.params, strict=True))
    for domain, cells in list(result["bits_per_byte"].items())[:3]:
        for name, params in {**every, "generalist": generalist}.items():
            nats = sum(window_nats([params], w) for w in windows[domain])
            size = sum(w.num_bytes for w in windows[domain])
            assert cells[name]["mean"] == pytest.approx(
                nats / size / np.log(2), rel=1e-4
            )
        nats = sum(window_nats(experts.params, w) for w in windows[domain])
        assert cells["emfuse"]["mean"] == pytest.approx(
            nats / size / np.log(2), rel=1e-4
        )
        low, high = cells["emfuse"]["interval"]
        assert low < cells["emfuse"]["mean"] < high
    table = result["bits_per_byte"]
    single = [table[domain]["packllm_opt"]["mean"] for domain in ("py", "man")]
    assert table["mean"]["packllm_opt"]["mean"] == pytest.approx(np.mean(single))
    apart = result["difference"]["bits_per_byte"]["py"]
    assert apart["emfuse"] == {"mean": 0.0, "interval": [0.0, 0.0]}
    assert apart["expert-py"]["mean"] == pytest.approx(
        table["py"]["expert-py"]["mean"] - table["py"]["emfuse"]["mean"]
    )
    assert result["models"] == ["generalist"]


def window_nats(params, window):
    """Of the uniform pool of some models, on a window's continuation."""
    tokens, start = list(window.tokens), window.num_prompt
    pool = normalised(sum(law(own, tokens) for own in params) / len(params))
    rows = np.arange(start - 1, len(tokens) - 1)
    return -float(pool[rows, tokens[start:]].sum())


def test_the_right_answer_is_the_one_that_the_prompt_speaks_for(fused, lm, experts):
    windows = _lm.read_prepared(lm / "text").windows["py"]
    score = np.full((len(windows), len(windows)), np.nan)
    for i, window in enumerate(windows):
        for j in (i, *window.distractors):
            tokens = window.tokens[:8] + windows[j].tokens[8:]
            score[i, j] = -window_nats(experts.params, window._replace(tokens=tokens))
    score -= np.nanmean(score, axis=0)
    right = np.sum(np.nanargmax(score, axis=1) == np.arange(len(windows)))
    assert 0 < right < len(windows)
    accuracy = read(fused / "scores" / "result.json")["accuracy"]
    assert accuracy["py"]["emfuse"]["mean"] == pytest.approx(right / len(windows))
    assert "mixed" not in accuracy  # there are no wrong answers


def test_drawn_divergences_keep_below_their_bound(fused):
    drawn = read(fused / "scores" / "result.json")["drawn"]
    means = {name: cell["mean"] for name, cell in drawn["nats"].items()}
    assert drawn["num_texts"] == 6
    for order in ("emselect", "emselect:order=pool"):
        assert 0 < means[order] <= means["bound"]
    assert means["bound"] <= means["expert-py"] + means["expert-man"]
    assert means["emselect:order=pool"] <= min(means["expert-py"], means["expert-man"])


def test_mixed_windows_are_shown(fused):
    result = read(fused / "scores" / "result.json")
    assert len(result["passages"]) == 2 * 2
    passage = result["passages"][1]
    assert (passage["rule"], passage["name"]) == ("packllm_opt", "py → man")
    assert len(passage["token_texts"]) == len(passage["weights"]) == 16
    page = (fused / "scores" / "mixed.html").read_text()
    assert "py → man" in page


def test_rules_replayed_are_the_fused_model(experts, lm):
    """The short cut of the matrix against the fusion itself."""
    rules = parse_rules(RULES)
    windows = _lm.read_prepared(lm / "text").windows["mixed"][:2]
    requests = [
        *_lm_score.to_requests(windows, ByteTokenizer(), same_tokens=True),
        ([256, 100], [101, 102, 32]),
    ]
    scores = _lm_score.Scorer(experts, rules)(requests).rules
    params = _lm_experts.join_params(experts)
    totals = []
    for rule in rules:
        found = scores[rule.label]
        model = _lm_experts.fuse_rule(experts, rule.rule)
        scorer = compile_scorer(model, block=None)
        direct = score_continuations(params, scorer, requests, batch_size=4)
        expected = [score.log_probs.sum() for score in direct]
        np.testing.assert_allclose(found.log_prob, expected, rtol=1e-4)
        np.testing.assert_allclose(found.weights.sum(1), 1.0, rtol=1e-5)
        assert (found.divergence > 0).all() or not rule.selects
        totals.append(expected[0])
    assert len(set(np.round(totals, 3))) == len(RULES)  # no rule passes for another


def test_different_architectures_and_temperatures(lm, tmp_path, capsys):
    wide = LmConfig(vocab_size=260, hidden_size=24, num_layers=1, num_heads=2)
    tiny.write_model(tmp_path / "wide", jax.random.key(5), wide)
    pair = f"--experts={lm}/models/expert-py,{tmp_path}/wide"
    flags = (pair, "--temperatures=1,2", "--weights=0.25,0.75", "--prompt=ab")
    call(*flags, "--sampling.max_new_tokens=3", f"--run_dir={tmp_path}/out")
    (passage,) = read(tmp_path / "out" / "result.json")["passages"]
    np.testing.assert_allclose(passage["weights"], [[0.25, 0.75]] * 3, rtol=1e-6)
    first = load_language_model(lm / "models" / "expert-py").params
    second = load_language_model(tmp_path / "wide").params
    tokens = [256, *b"ab"]
    # Padded rows of an embedding are no tokens.
    flat = normalised(law(second, tokens, wide)[-1, :257] / 2.0)
    pool = normalised(0.25 * law(first, tokens)[-1] + 0.75 * flat)
    assert passage["tokens"][0] == int(pool.argmax())
    assert passage["log_probs"][0] == pytest.approx(float(pool.max()), abs=1e-4)


def test_a_prompt_file_has_one_prompt_or_many(lm, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("def f(x):\nself")
    (tmp_path / "many.jsonl").write_text('{"prompt": "a, b"}\n\n{"prompt": "c"}\n')
    assert fuse_llm.read_prompts(tmp_path / "one.txt") == ["def f(x):\nself"]
    flags = (f"--experts={lm}", "--sampling.max_new_tokens=3", "--sampling.stop=\\n,zz")
    call(*flags, f"--prompt_file={tmp_path}/many.jsonl", f"--run_dir={tmp_path}/out")
    passages = read(tmp_path / "out" / "result.json")["passages"]
    assert [p["prompt"] for p in passages] == ["a, b", "c"]
    assert capsys.readouterr().out.splitlines() == [p["text"] for p in passages]


def test_chat_remembers_and_resumes(lm, tmp_path, monkeypatch, capsys):
    flags = (f"--experts={lm}", "--chat", f"--run_dir={tmp_path}/chat")
    flags += ("--sampling.max_new_tokens=3", "--rule=emselect")
    monkeypatch.setattr(sys, "stdin", io.StringIO("def\n\nself\n/quit\nnever\n"))
    call(*flags)
    assert "no chat template" in " ".join(capsys.readouterr().err.split())
    messages = read(tmp_path / "chat" / "messages.json")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in messages[::2]] == ["def", "self"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n" + "y" * 70 + "\n"))
    call(*flags)
    err = " ".join(capsys.readouterr().err.split())
    messages = read(tmp_path / "chat" / "messages.json")
    assert messages[4]["content"] == "x"
    assert len(messages) == 6  # the line that was too long is not kept
    assert "the message has" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("/reset\n"))
    call(*flags)
    assert read(tmp_path / "chat" / "messages.json") == []


def test_chat_forgets_the_oldest_turns(experts):
    class Template(ByteTokenizer):
        def chat(self, messages):
            return self.encode("".join(m["role"][0] + m["content"] for m in messages))

    sampling = fuse_llm.Sampling(max_new_tokens=24)
    voice = fuse_llm.make_voice(
        experts._replace(tokenizer=Template()),
        None,
        parse_rules(["emfuse"])[0],
        sampling,
    )
    assert _lm_chat.has_template(Template())
    assert not _lm_chat.has_template(ByteTokenizer())
    turns = [{"role": r, "content": c * 9} for r, c in zip("uaua", "abcd", strict=True)]
    turns.append({"role": "u", "content": "e" * 9})
    tokens = _lm_chat.fitting_tokens(voice, turns, "be kind", template=True)
    assert bytes(tokens).decode() == "sbe kind" + "".join(
        t["role"] + t["content"] for t in turns[2:]
    )


def test_text_on_a_terminal_is_coloured_and_cannot_steer_it(lm, capsys):
    flags = (f"--experts={lm}", "--prompt=a\x1b[2J", "--sampling.max_new_tokens=3")
    call(*flags, "--colour=always")
    out = capsys.readouterr().out
    assert "␛[2J" in out
    assert re.search(r"\x1b\[38;5;\d+m", out)
    assert set(re.findall(r"\x1b\[[^m]*", out)) <= {
        *("\x1b[38;5;33", "\x1b[38;5;214", "\x1b[0", "\x1b[2")
    }
    call(*flags)
    assert "\x1b" not in capsys.readouterr().out


# What cannot be done


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command that must refuse and write nothing; returns its words."""

    def run(*flags):
        before = sorted(tmp_path.rglob("*")), _tiny_runs.snapshot(tmp_path)
        status = fuse_llm.main(["fuse_llm", *map(str, flags)])
        error = " ".join(capsys.readouterr().err.split())
        assert status == 2, error
        assert error.startswith("error: "), error
        assert "Traceback" not in error
        assert (sorted(tmp_path.rglob("*")), _tiny_runs.snapshot(tmp_path)) == before
        return error

    return run


def test_what_to_do_must_be_said_once(refused, lm):
    assert "--experts is required" in refused("--prompt=x")
    experts = f"--experts={lm}"
    assert "give one of --prompt" in refused(experts)
    assert "an empty one" in refused(experts, "--prompt=")
    assert "not --prompt and --chat" in refused(experts, "--prompt=x", "--chat")
    assert "--run_dir is required" in refused(experts, f"--score={lm}")
    error = refused(experts, "--chat", "--rule=emfuse,emselect")
    assert "takes one rule" in error


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            "emfus",
            ["unknown fusion rule 'emfus'", "'emfuse'", "packllm_sim", "evidence"],
        ),
        ("emselect:alpah=1", ["'alpah=1'", "alpha=0.5, order=tournament"]),
        ("emselect:alpha=x", ["alpha='x' is no float"]),
        ("emselect:alpha=2", ["alpha 2.0", "[0, 1]"]),
        ("evidence:linear=maybe", ["linear=maybe", "true or false"]),
        ("emfuse,emfuse", ["names a rule twice"]),
        ("fixed", ["needs --weights"]),
        ("emfuse:weights=1", ["it has none"]),
    ],
)
def test_rules_that_are_none(refused, lm, rule, words):
    error = refused(f"--experts={lm}", "--prompt=x", f"--rule={rule}")
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--weights=0.5", ["1 values for 2 experts", "one for each"]),
        ("--weights=0.5,0.6", ["sum to 1.1", "[0.454545, 0.545455]"]),
        ("--weights=1.5,-0.5", ["negative"]),
        ("--temperatures=1,1,1", ["3 values for 2 experts"]),
        ("--temperatures=1,0", ["temperatures [1.0, 0.0]", "positive"]),
        ("--rule=evidence --weights=0.5,0.5", ["not used by --rule=evidence", "fixed"]),
        ("--sampling.temperature=-1", ["temperature=-1.0", "not negative"]),
        ("--sampling.top_p=1.5", ["top_p=1.5"]),
        ("--sampling.stop=a,,b", ["stop string is empty"]),
        ("--sampling.max_new_tokens=0", ["must be at least 1"]),
    ],
)
def test_numbers_that_cannot_be(refused, lm, flag, words):
    error = refused(f"--experts={lm}", "--prompt=x", *flag.split(" "))
    for word in words:
        assert word in error


def test_prompts_that_cannot_be_read(refused, lm, tmp_path):
    experts = f"--experts={lm}"
    error = refused(experts, f"--prompt={'x' * 70}", f"--run_dir={tmp_path}/out")
    assert "prompt 0 has 71 tokens and 128 more are to follow" in error
    assert "the model's context holds 64" in error
    assert "--sampling.max_new_tokens=128" in error
    (tmp_path / "empty.txt").write_text(" \n")
    error = refused(experts, f"--prompt_file={tmp_path}/empty.txt")
    assert "empty.txt is empty" in error
    (tmp_path / "latin.txt").write_bytes("é".encode("latin1"))
    assert "not UTF-8" in refused(experts, f"--prompt_file={tmp_path}/latin.txt")
    assert "none.txt" in refused(experts, f"--prompt_file={tmp_path}/none.txt")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    error = refused(experts, f"--prompt_file={tmp_path}/bad.jsonl")
    assert "line 2 is not" in error
    (tmp_path / "bad.jsonl").write_text('{"prompt": ""}\n')
    error = refused(experts, f"--prompt_file={tmp_path}/bad.jsonl")
    assert "line 1 has an empty prompt" in error
    (tmp_path / "two.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "%s"}\n' % ("b" * 99)
    )
    error = refused(
        experts, f"--prompt_file={tmp_path}/two.jsonl", "--sampling.max_new_tokens=9"
    )
    assert "prompt 1 has 100 tokens" in error


def test_folders_that_hold_no_model(refused, lm, tmp_path):
    one = lm / "models" / "expert-py"
    error = refused(f"--experts={one},{tmp_path}/none", "--prompt=x")
    assert f"expert {tmp_path}/none is no folder" in error
    assert "names a model twice" in refused(f"--experts={one},{one}", "--prompt=x")
    (tmp_path / "run" / "models").mkdir(parents=True)
    assert "is not finished" in refused(f"--experts={tmp_path}/run", "--prompt=x")
    shutil.copytree(one, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    error = refused(f"--experts={one},{tmp_path}/bare", "--prompt=x")
    assert f"{tmp_path}/bare has no tokenizer.json" in error
    shutil.copytree(one, tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").rename(tmp_path / "shards" / "a.bin")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    artifacts.write_json(tmp_path / "shards" / "model.safetensors.index.json", index)
    error = refused(f"--experts={one},{tmp_path}/shards", "--prompt=x")
    assert "model-00001-of-00002.safetensors is missing" in error
    shutil.copytree(one, tmp_path / "other")
    config = read(tmp_path / "other" / "config.json") | {"model_type": "gpt2"}
    artifacts.write_json(tmp_path / "other" / "config.json", config)
    error = refused(f"--experts={one},{tmp_path}/other", "--prompt=x")
    assert "model_type='gpt2'" in error


def test_vocabularies_that_differ(refused, lm, tmp_path):
    pytest.importorskip("tokenizers")
    one = lm / "models" / "expert-py"
    texts = ["def self return None (x): = for i in"] * 20
    (tmp_path / "tokenizer").mkdir()
    _lm.save_tokenizer(tmp_path / "tokenizer", texts, 262)
    tokenizer = _lm.load_tokenizer(tmp_path / "tokenizer")
    config = LmConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=2
    )
    tiny.write_model(tmp_path / "bpe", jax.random.key(7), config, tokenizer=tokenizer)
    pair = (f"--experts={one},{tmp_path}/bpe", "--prompt=def")
    error = refused(*pair)
    assert "the vocabulary of expert 1 differs" in error
    assert "expert 1: bpe" in error
    assert "--map_vocabulary" in error
    error = refused(*pair, "--map_vocabulary", "--min_exact=1")
    assert "min_exact=0.98" in error
    call(*pair, "--map_vocabulary", "--sampling.max_new_tokens=2")


def test_scores_that_cannot_be_made(refused, lm, tmp_path):
    flags = (f"--experts={lm}", f"--run_dir={tmp_path}/out")
    assert "holds no prepared text" in refused(*flags, f"--score={tmp_path}/x")
    error = refused(*flags, f"--score={lm}", "--scoring.baseline=soup")
    assert "--scoring.baseline=soup is none of expert-py" in error
    short = LmConfig(**(vars(tiny.CONFIG) | {"context_length": 16}))
    tiny.write_model(tmp_path / "short", jax.random.key(3), short)
    error = refused(
        f"--experts={tmp_path}/short", f"--score={lm}", f"--run_dir={tmp_path}/out"
    )
    assert "8 + 16 tokens, but the context holds 16" in error
