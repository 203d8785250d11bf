"""Training language models at the command line: what a run leaves, that it resumes, that
others can read its models, and what it refuses."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import _tiny_runs as tiny
from emfuse_jax import artifacts
from emfuse_jax.llm.model import logits
from emfuse_jax.llm.tokenizer import load_tokenizer
from emfuse_jax.llm.weights import load_language_model
from experiments import _lm
from experiments import train_lm_experts as command
from experiments.train_lm_experts import TrainLmExpertsConfig, plan

ROOT = pathlib.Path(__file__).parents[2]
WORDS = {
    "latin": "arma virumque cano troiae qui primus ab oris italiam fato profugus",
    "code": "def (self): return lambda x: None for in if else import class try",
}
TINY = (
    *("--tokenizer=byte", "--model.num_layers=1", "--model.hidden_size=16"),
    *("--model.num_heads=2", "--model.num_kv_heads=1", "--model.intermediate_size=16"),
    *("--base_steps=20", "--expert_steps=20", "--chunk=10", "--save_every=1"),
    *("--batch_size=4", "--window=24", "--prompt=8", "--num_windows=40"),
    "--training.learning_rate=0.02",
)


def write_domains(root, files=12):
    """Random words of one language per folder."""
    rng = np.random.default_rng(0)
    for domain, words in WORDS.items():
        (root / domain).mkdir(parents=True)
        for index in range(files):
            drawn = rng.choice(words.split(), (20, 6))
            text = "\n".join(" ".join(line) for line in drawn)
            (root / domain / f"{index}.txt").write_text(text)
    return f"--domains={','.join(f'{name}={root}/{name}' for name in WORDS)}"


def flags(root, name, *more):
    domains = f"--domains={','.join(f'{n}={root}/text/{n}' for n in WORDS)}"
    return (f"--run_dir={root}/{name}", domains, *TINY, *more)


def run(*argv):
    assert command.main(["train_lm_experts", *map(str, argv)]) == 0


@pytest.fixture(scope="module", autouse=True)
def _no_compiled_program_is_taken_from_elsewhere():
    """Bits may differ between a program compiled here and one from the cache."""
    before = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMFUSE_JAX_CACHE", "0")
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        jax.config.update("jax_compilation_cache_dir", None)
        yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two domains, and a finished run on them; do not write into it."""
    path = tmp_path_factory.mktemp("lm")
    write_domains(path / "text")
    run(*flags(path, "run"))
    return path


def test_a_run_leaves_models_text_and_a_table(root):
    path = root / "run"
    names = ["base", "expert-latin", "expert-code", "generalist"]
    assert {p.name for p in (path / "models").iterdir()} == set(names)
    assert {p.name for p in (path / "training").iterdir()} == set(names)
    result = artifacts.read_json(path / "result.json")
    assert list(result["models"]) == names
    steps = [result["models"][name]["num_steps"] for name in names]
    assert steps == [20, 20, 20, 40]  # the generalist's with its base's: as all others'
    table = result["bits_per_byte"]
    for domain in WORDS:
        own, other = (table[f"expert-{name}"][domain] for name in WORDS)
        own, other = (own, other) if domain == "latin" else (other, own)
        assert own < other
        assert own < table["base"][domain] < 8.5
    assert result["text"]["latin"]["train_documents"] == 10
    metrics = tiny.rows_of(path / "training" / "generalist")
    assert [row["step"] for row in metrics] == [10, 20, 30, 40]
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_the_table_is_the_windows_likelihood(root):
    """By hand: bits of the continuations given their prompts, over their bytes."""
    prepared = _lm.read_prepared(root / "run" / "text")
    loaded = load_language_model(root / "run" / "models" / "expert-code")
    table = artifacts.read_json(root / "run" / "result.json")["bits_per_byte"]
    windows = prepared.windows["code"]
    tokens = np.array([window.tokens for window in windows])
    scores = logits(
        loaded.config,
        loaded.params,
        jax.numpy.asarray(tokens, jax.numpy.int32),
        jax.numpy.ones(tokens.shape, bool),
    )
    log_probs = np.asarray(jax.nn.log_softmax(scores), np.float64)
    rows, columns = np.indices(tokens[:, 1:].shape)
    found = log_probs[rows, columns, tokens[:, 1:]]
    bits = -found[:, 7:].sum() / np.log(2)
    size = sum(len(window.continuation.encode()) for window in windows)
    assert size == 16 * len(windows)  # one byte per token
    assert table["expert-code"]["code"] == pytest.approx(bits / size, rel=1e-5)


def test_held_out_windows_are_the_texts_own(root):
    text = root / "run" / "text"
    prepared = _lm.read_prepared(text)
    assert list(prepared.windows) == ["latin", "code", "mixed"]
    tokenizer = load_tokenizer(text / "tokenizer")
    for stream, domain in zip(prepared.streams, prepared.domains, strict=True):
        lines = (text / "held_out" / f"{domain}.jsonl").read_text().split("\n")[:-1]
        documents = {row["name"]: row["text"] for row in map(json.loads, lines)}
        trained = tokenizer.decode(stream.tolist())
        windows = prepared.windows[domain]
        for window in windows:
            whole = window.prompt + window.continuation
            assert whole in documents[window.documents[0]]
            assert tokenizer.decode(window.tokens) == whole
            assert len(window.tokens[: window.num_prompt]) == 8
        assert not any(d.splitlines()[0] in trained for d in documents.values())
        # A right answer is a wrong one as often.
        wrong = [i for window in windows for i in window.distractors]
        assert set(np.bincount(wrong)) == {3}
        assert all(i not in window.distractors for i, window in enumerate(windows))
    for window in prepared.windows["mixed"]:
        first, second = (
            next(w for w in prepared.windows[d] if w.documents == (name,))
            for d, name in zip(window.domains, window.documents, strict=True)
        )
        assert window.starts == (0, 12)
        known = {w.tokens[:12] for w in prepared.windows[window.domains[0]]}
        assert window.tokens[:12] in known
        assert first.domains != second.domains


def test_rerunning_changes_nothing(root):
    before = tiny.snapshot(root / "run" / "models")
    rows = tiny.rows_of(root / "run" / "training" / "base")
    run(*flags(root, "run"))
    assert tiny.snapshot(root / "run" / "models") == before
    assert tiny.rows_of(root / "run" / "training" / "base") == rows


def test_regimes_differ_in_the_start_and_not_in_the_compute():
    config = TrainLmExpertsConfig()
    shared = plan(config, ("a", "b", "c"))
    assert [job.name for job in shared] == [
        *("base", "expert-a", "expert-b", "expert-c", "generalist")
    ]
    assert {job.start for job in shared[1:]} == {"base"}
    assert shared[2].shares == (0.0, 1.0, 0.0)
    scratch = plan(TrainLmExpertsConfig(regime="scratch"), ("a", "b", "c"))
    assert [job.start for job in scratch] == [""] * 4
    experts = sum(job.num_steps for job in scratch[:3])
    assert experts == sum(job.num_steps for job in shared[:4]) == 1350
    assert scratch[3].num_steps == experts
    assert shared[0].num_steps + shared[4].num_steps == experts


def test_seeds_and_regimes_share_a_text(root):
    more = (f"--text_from={root}/run", "--regime=scratch", "--seed=1")
    argv = [f for f in flags(root, "scratch", *more) if not f.startswith("--domains")]
    run(*argv)
    texts = [tiny.snapshot(root / name / "text") for name in ("run", "scratch")]
    assert texts[0] == texts[1]
    assert not (root / "scratch" / "models" / "base").exists()
    embed = [
        load_language_model(root / "scratch" / "models" / f"expert-{name}").params[
            "embed"
        ]
        for name in WORDS
    ]
    assert np.abs(np.asarray(embed[0] - embed[1])).mean() > 0.05
    argv = [f.replace("--window=24", "--window=20") for f in argv]
    argv[0] = f"--run_dir={root}/other"
    assert command.main(["train_lm_experts", *argv]) == 2
    assert not (root / "other").exists()


KILLER = """
import os, signal, sys
from experiments import train_lm_experts as command, _run
saves = 0
save = _run.Run.save
def killing(self, step, *args, **kwargs):
    global saves
    save(self, step, *args, **kwargs)
    saves += 1
    if saves == 3:
        os.kill(os.getpid(), signal.SIGKILL)
_run.Run.save = killing
sys.exit(command.main(["command", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_training_survives_kill_9(root):
    """Killed in the middle of the first expert: the base is not trained again, and all
    models end up bit for bit as without the kill."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLER, *flags(root, "killed")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    path = root / "killed"
    assert [p.name for p in (path / "models").iterdir()] == ["base"]
    assert artifacts.steps(path / "training" / "expert-latin" / "checkpoints") == [10]
    stamp = (path / "models" / "base" / "model.safetensors").stat().st_mtime_ns
    run(*flags(root, "killed"))
    assert (path / "models" / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    assert tiny.snapshot(path / "models") == tiny.snapshot(root / "run" / "models")
    results = [
        artifacts.read_json(p / "result.json")["bits_per_byte"]
        for p in (path, root / "run")
    ]
    assert results[0] == results[1]


def test_transformers_reads_what_was_written(root, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    texts = ["def f(x):\n    return x  # naïve\n" * 30]
    _lm.save_tokenizer(tmp_path, texts, 270)
    text = "  def g(ä):\n\treturn None"
    for folder in (tmp_path, root / "run" / "models" / "base"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = load_tokenizer(folder)
        assert theirs.encode(text) == ours.encode(text, special=True)
        assert theirs.encode(text)[0] == ours.bos_id == theirs.bos_token_id
        assert (
            theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
        )
    folder = root / "run" / "models" / "expert-latin"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded = load_language_model(folder)
    tokens = np.arange(40).reshape(2, 20) * 5 % 257
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    found = logits(
        loaded.config,
        loaded.params,
        jax.numpy.asarray(tokens, jax.numpy.int32),
        jax.numpy.ones(tokens.shape, bool),
    )
    np.testing.assert_allclose(found, expected, atol=5e-6)
    assert model.config.eos_token_id == 256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--base_steps=15"], "base_steps=15 must be a positive multiple of chunk=10"),
        (["--prompt=24"], "prompt=24 must be at least 1 and below window=24"),
        (["--model.hidden_size=18"], "multiple of 2 * num_heads=4"),
        (["--text.held_out=1.5"], "held_out=1.5"),
        (["--text_from=nowhere"], "exclude each other"),
        (["--domains=mixed=text"], "no domain can be called mixed"),
        (["--domains=pyton"], "did you mean 'python'"),
        (["--domains=a=nowhere"], "domain 'a': no file or folder nowhere"),
        (["--domains="], ""),
    ],
)
def test_bad_input_leaves_nothing_behind(root, tmp_path, capsys, changes, words):
    if changes == ["--domains="]:
        # Text that is refused when it is read.
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "x.txt").write_bytes(b"caf\xe9" * 100)
        changes, words = [f"--domains=bad={tmp_path}/bad"], "byte 3 (0xe9) is not UTF-8"
    before = sorted(tmp_path.rglob("*"))
    argv = [*flags(root, "none"), f"--run_dir={tmp_path}/run", *changes]
    assert command.main(["train_lm_experts", *argv]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert words in error
    assert sorted(tmp_path.rglob("*")) == before


def test_documents_shorter_than_a_window_are_refused(root, tmp_path, capsys):
    argv = [f"--run_dir={tmp_path}/run", *flags(root, "none")[1:], "--window=3000"]
    assert command.main(["train_lm_experts", *argv]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "held-out documents has 3000 tokens" in error
    assert not (tmp_path / "run").exists()
