import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from _table_lm import scripted_params, table_law, table_lm, table_params, table_scores
from emfuse_jax.evaluation.harness import harness_model
from emfuse_jax.evaluation.scoring import rolling_windows
from emfuse_jax.llm.emselect import emselect
from emfuse_jax.llm.fuse import fuse_language_models

pytest.importorskip("lm_eval", reason="pip install emfuse_jax[llm_eval]")

LETTERS = "abc \n"
VOCAB = len(LETTERS) + 1
CONTEXT = 48


class LetterTokenizer:
    """One token per letter; 0 ends a text, and 5 may begin one."""

    eos_id, bos_id, pad_id, vocab_size = 0, None, None, VOCAB
    names = ("<end>", *LETTERS)

    def encode(self, text, *, special=False):
        begin = [self.bos_id] * (special and self.bos_id is not None)
        if text == "<end>":
            return [*begin, 0]
        return begin + [self.names.index(letter) for letter in text]

    def decode(self, ids, *, special=False):
        return "".join(self.names[i] for i in ids if i or special)

    def vocab(self):
        return list(self.names)

    def chat(self, messages, *, add_generation_prompt=True):
        return self.encode("".join(message["content"] + "\n" for message in messages))

    def save(self, folder):
        raise NotImplementedError


TOKENIZER = LetterTokenizer()
CHOICES = [
    {"question": "ab", "options": ["c", "ca"], "label": 0},
    {"question": "cab", "options": ["bb", "a b"], "label": 1},
    {"question": "a", "options": ["b", "c"], "label": 0},
    {"question": "bb ca", "options": ["abc", "c"], "label": 1},
]
TEXTS = ["abc cab", "a", "bca abc\n" * 12]
PROMPTS = [{"prompt": "ab", "answer": "ca"}, {"prompt": "abab", "answer": "b"}]

TASKS = {
    "letters_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: options
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
""",
    "letters_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
""",
    "letters_generate": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: [" b"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
""",
}
DOCUMENTS = {
    "letters_choice": CHOICES,
    "letters_rolling": [{"text": text} for text in TEXTS],
    "letters_generate": PROMPTS,
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks with their data beside them; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, body in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS[name]))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ntest_split: test\ndataset_path: json\ndataset_kwargs:\n"
            f"  data_files: {{test: {data}}}\n  cache_dir: {folder / 'cache'}\n" + body
        )
    return folder


@pytest.fixture(scope="module")
def params():
    return table_params(jax.random.key(3), VOCAB)


def evaluate(model, folder, *names):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=10,
        torch_random_seed=None,
        confirm_run_unsafe_code=False,
    )
    assert found is not None
    return {name: found["results"][name] for name in names}


def request(*args):
    return SimpleNamespace(args=args)


def score(params, context, text):
    encode = TOKENIZER.encode
    return table_scores(params, encode(context) or [0], encode(text))


def test_the_harness_runs_offline_tasks_as_computed_by_hand(tasks, params):
    model = harness_model(
        params, table_lm(VOCAB, context_length=CONTEXT), TOKENIZER, batch_size=3
    )
    results = evaluate(model, tasks, *TASKS)

    right = [
        np.argmax(
            [score(params, row["question"], f" {x}").sum() for x in row["options"]]
        )
        == row["label"]
        for row in CHOICES
    ]
    assert 0 < sum(right) < len(right)
    assert results["letters_choice"]["acc,none"] == pytest.approx(np.mean(right))

    total = sum(
        table_scores(params, *window).sum()
        for text in TEXTS
        for window in rolling_windows(TOKENIZER.encode(text), 0, CONTEXT)
    )
    size = sum(len(text.encode()) for text in TEXTS)
    bits = results["letters_rolling"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / size / np.log(2), rel=1e-4)
    # One text is longer than the context.
    assert len(TOKENIZER.encode(TEXTS[-1])) > CONTEXT


def test_generation_ends_at_stop_strings_and_at_the_end_of_text(tasks):
    # After two tokens "ca b…", after four " b", and after six the end of the text.
    params = scripted_params([3, 1, 4, 2, 0], VOCAB, start=2)
    model = harness_model(params, table_lm(VOCAB, context_length=CONTEXT), TOKENIZER)
    results = evaluate(model, tasks, "letters_generate")
    assert results["letters_generate"]["exact_match,none"] == 0.5
    options = {"until": ["bbb"], "max_gen_toks": 9, "do_sample": False}
    texts = model.generate_until(
        [request("ab", options), request("abca", options), request("", options)],
        disable_tqdm=True,
    )
    assert texts[:2] == ["ca b", " b"]
    short = model.generate_until(
        [request("ab", {"until": [], "max_new_tokens": 3})], disable_tqdm=True
    )
    assert short == ["ca "]


def test_a_stop_string_that_is_a_special_token_stops():
    class Turns(LetterTokenizer):
        """Its token 4, the space, is special: decoding leaves it out."""

        def decode(self, ids, *, special=False):
            return super().decode([i for i in ids if special or i != 4])

    params = scripted_params([3, 1, 4, 2, 2], VOCAB, start=2)
    model = harness_model(params, table_lm(VOCAB), Turns())
    options = {"until": [" ", "bbb"], "max_gen_toks": 5}
    assert model.generate_until([request("ab", options)], disable_tqdm=True) == ["ca"]
    options = {"until": ["bbb"], "max_gen_toks": 5}
    assert model.generate_until([request("ab", options)], disable_tqdm=True) == ["cabb"]


def test_programs_are_shared_by_requests_of_a_bucket(params):
    traces = {}
    lm = table_lm(VOCAB, context_length=CONTEXT, traces=traces)
    model = harness_model(params, lm, TOKENIZER, batch_size=2, chunk=4)
    options = {"until": [" "], "max_gen_toks": 8}
    prompts = ["a", "abc", "ab" * 4, "c" * 16, "b"]
    model.generate_until([request(x, options) for x in prompts], disable_tqdm=True)
    assert traces == {"prefill": 1, "step": 1}
    traces.clear()
    pairs = [("a", "b"), ("abc", "abc"), ("", "c" * 8), ("c" * 15, "b")]
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    assert traces == {"prefill": 1, "extend": 1}
    for pair, (log_prob, _) in zip(pairs, found, strict=True):
        assert log_prob == pytest.approx(score(params, *pair).sum(), rel=1e-4)


def test_greedy_is_asked_of_the_fused_law():
    experts = tuple(table_params(jax.random.key(i), VOCAB) for i in (5, 6, 7))
    single = table_lm(VOCAB, context_length=CONTEXT)
    fused = fuse_language_models([single] * 3, emselect(order="pool"))
    model = harness_model(experts, fused, TOKENIZER, batch_size=4)
    contexts = ["a", "bc", "cab", "b b"]
    texts = model.generate_until(
        [request(x, {"max_gen_toks": 4}) for x in contexts], disable_tqdm=True
    )
    pairs = [(x, y) for x, y in zip(contexts, texts, strict=True) if y]
    answers = model.loglikelihood([request(*p) for p in pairs], disable_tqdm=True)
    assert len(pairs) > 1
    assert all(greedy for _, greedy in answers)
    # Of every single expert some of it is not the argmax.
    wholes = [tuple(map(TOKENIZER.encode, pair)) for pair in pairs]
    for params in experts:
        assert not all(
            np.argmax(table_law(params, context + text[:t])) == token
            for context, text in wholes
            for t, token in enumerate(text)
        )


def test_contexts_lose_their_beginning_where_there_is_no_room(params):
    lm = table_lm(VOCAB, context_length=8)
    model = harness_model(params, lm, TOKENIZER, batch_size=2, max_new_tokens=4)
    long = "abcab cabca"
    with pytest.warns(UserWarning, match="1 contexts exceed"):
        found = model.loglikelihood(
            [request(long, "bb"), request("a", "b")], disable_tqdm=True
        )
    expected = table_scores(params, TOKENIZER.encode(long)[-7:], TOKENIZER.encode("bb"))
    assert found[0][0] == pytest.approx(expected.sum(), rel=1e-4)
    assert found[0][0] != pytest.approx(score(params, long, "bb").sum(), rel=1e-3)
    with pytest.warns(UserWarning, match="lost their beginning"):
        (text,) = model.generate_until([request(long, {})], disable_tqdm=True)
    tokens = TOKENIZER.encode(long)[-4:]
    for _ in text:
        tokens.append(int(np.argmax(table_law(params, tokens))))
    assert text == TOKENIZER.decode(tokens[4:])
    with pytest.raises(ValueError, match="followed by 9 tokens"):
        model.loglikelihood([request("a", "b" * 9)], disable_tqdm=True)
    with pytest.raises(ValueError, match="max_gen_toks"):
        model.generate_until([request("a", {"max_gen_toks": 8})], disable_tqdm=True)


def test_sampling_follows_the_key_and_its_options(params):
    lm = table_lm(VOCAB, context_length=CONTEXT)
    sampled = {"temperature": 1.0, "do_sample": True, "max_gen_toks": 9}
    greedy = {"max_gen_toks": 9, "do_sample": False, "temperature": 1.0}
    top = {"max_gen_toks": 9, "do_sample": True, "temperature": 0.9, "top_k": 1}

    def generate(model, options):
        return model.generate_until([request("ab", options)] * 2, disable_tqdm=True)

    first, other = (
        harness_model(params, lm, TOKENIZER, batch_size=2, key=jax.random.key(seed))
        for seed in (0, 1)
    )
    drawn = generate(first, sampled)
    assert drawn == generate(first, sampled)
    assert drawn[0] != drawn[1]
    assert drawn != generate(other, sampled)
    cold = generate(first, {"max_gen_toks": 9})
    assert cold == generate(first, greedy) == generate(first, top)
    assert cold[0] == cold[1]


def test_the_beginning_of_text_is_put_before_every_context(params):
    class WithBos(LetterTokenizer):
        bos_id = 5

    lm = table_lm(VOCAB, context_length=CONTEXT)
    model = harness_model(params, lm, WithBos(), batch_size=2)
    found = model.loglikelihood(
        [request("ab", "ca"), request("", "ca")], disable_tqdm=True
    )
    for context, (log_prob, _) in zip(([5, 1, 2], [5]), found, strict=True):
        expected = table_scores(params, context, [3, 1]).sum()
        assert log_prob == pytest.approx(expected, rel=1e-4)
    assert model.tok_encode("\nab") == [5, 1, 2]  # it is there already
    assert model.prefix_token_id == 5
    bare = harness_model(params, lm, WithBos(), special=False, batch_size=2)
    ((log_prob, _),) = bare.loglikelihood([request("ab", "ca")], disable_tqdm=True)
    assert log_prob == pytest.approx(score(params, "ab", "ca").sum(), rel=1e-4)


def test_chats_become_text(params):
    model = harness_model(params, table_lm(VOCAB), TOKENIZER)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert model.apply_chat_template(chat) == "ab\nc\n"
    with pytest.raises(ValueError, match="apply_chat_template=False"):
        model.apply_chat_template(chat, add_generation_prompt=False)


def test_without_the_harness_its_extra_is_named(params, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"pip install emfuse_jax\[llm_eval\]"):
        harness_model(params, table_lm(VOCAB), TOKENIZER)


def test_bad_requests_are_named(params):
    lm = table_lm(VOCAB)
    model = harness_model(params, lm, TOKENIZER)
    with pytest.raises(
        ValueError, match=r"options \['repetition_penalty'\]; known are"
    ):
        model.generate_until(
            [request("a", {"repetition_penalty": 1.2})], disable_tqdm=True
        )
    with pytest.raises(ValueError, match="num_beams=4"):
        model.generate_until([request("a", {"num_beams": 4})], disable_tqdm=True)

    class Endless(LetterTokenizer):
        eos_id = None

    with pytest.raises(ValueError, match="no end-of-text token"):
        harness_model(params, lm, Endless())
