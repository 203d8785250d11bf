"""Tasks of lm-evaluation-harness at the command line, from a folder, without a network."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _tiny_lms as tiny
from emfuse_jax import artifacts
from emfuse_jax.llm.model import logits
from emfuse_jax.llm.tokenizer import ByteTokenizer
from experiments import _lm_experts, _lm_tasks, fuse_llm

# The first answers are of letters that the first expert prefers.
QUESTIONS = [
    {"question": "def self", "options": ["xd", "HB"], "label": 0},
    {"question": ".BR option", "options": ["(x)", "TPR"], "label": 0},
    {"question": "for i in", "options": ["=:", "pa"], "label": 0},
    {"question": "return", "options": ["xxr", "BHT"], "label": 1},
]
BODY = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: options
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return tiny.write_run(tmp_path_factory.mktemp("lm") / "run")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "tiny.yaml").write_text(
        f"task: tiny_choice\ntest_split: test\ndataset_path: json\ndataset_kwargs:\n"
        f"  data_files: {{test: {data}}}\n  cache_dir: {folder / 'cache'}\n{BODY}"
    )
    return folder


def accuracy(params):
    """Of the uniform pool, by hand."""
    hits = 0
    for row in QUESTIONS:
        scores = []
        for option in row["options"]:
            start = ByteTokenizer().encode(row["question"], special=True)
            tokens = jnp.asarray([start + ByteTokenizer().encode(option)])
            valid = jnp.ones(tokens.shape, bool)
            pool = sum(
                jax.nn.log_softmax(logits(tiny.CONFIG, own, tokens, valid)[0])
                for own in params
            )
            law = np.asarray(jax.nn.log_softmax(pool / len(params)))
            places = np.arange(len(start), tokens.shape[1])
            scores.append(law[places - 1, np.asarray(tokens)[0, places]].sum())
        hits += int(np.argmax(scores)) == row["label"]
    return hits / len(QUESTIONS)


def test_metrics_with_their_errors():
    row = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "acc_norm,strict": 0.75,
        "acc_norm_stderr,strict": "N/A",
        "sample_len": 4,
    }
    assert _lm_tasks._metrics(row) == {
        "acc": {"mean": 0.5, "stderr": 0.25},
        "acc_norm (strict)": {"mean": 0.75, "stderr": None},
    }


def test_local_tasks_of_experts_and_rules(lm, tasks, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install emfuse_jax[llm_eval]")
    monkeypatch.setenv("EMFUSE_JAX_CACHE", "0")
    argv = ["fuse_llm", f"--experts={lm}", "--tasks=tiny_choice", "--task.alone"]
    argv += [f"--task.include_path={tasks}", "--rule=emfuse", "--task.batch_size=4"]
    argv += [f"--run_dir={tmp_path}/out"]
    assert fuse_llm.main(argv) == 0
    assert "tiny_choice acc" in capsys.readouterr().out
    found = artifacts.read_json(tmp_path / "out" / "result.json")["tasks"]
    params = _lm_experts.open_experts([str(lm)]).params
    expected = {
        "expert-py": accuracy(params[:1]),
        "expert-man": accuracy(params[1:]),
        "emfuse": accuracy(params),
    }
    means = {name: row["tiny_choice"]["acc"]["mean"] for name, row in found.items()}
    assert means == pytest.approx(expected)
    assert len(set(expected.values())) > 1  # else the order would not be tested
    # What is finished is not run again.
    monkeypatch.setattr(_lm_tasks, "run_tasks", pytest.fail)
    assert fuse_llm.main(argv) == 0


@pytest.mark.slow  # looks through all of the harness' own tasks
def test_tasks_that_nobody_has(lm, tasks, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="pip install emfuse_jax[llm_eval]")
    argv = ["fuse_llm", f"--experts={lm}", f"--run_dir={tmp_path}/out"]
    assert (
        fuse_llm.main([*argv, "--tasks=x", f"--task.include_path={tmp_path}/no"]) == 2
    )
    error = " ".join(capsys.readouterr().err.split())
    assert f"--task.include_path={tmp_path}/no is no folder" in error
    local = f"--task.include_path={tasks}"
    assert fuse_llm.main([*argv, "--tasks=tiny_choices", local]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "no task 'tiny_choices'; near: tiny_choice" in error
    assert not (tmp_path / "out").exists()
