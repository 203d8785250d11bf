"""Reports of language models, from the JSON files that the commands leave."""

import matplotlib.image
import pytest

from emfuse_jax import artifacts
from experiments import _gather, _lm_plots, _lm_report, report

METHODS = ("expert-py", "expert-man", "emfuse", "evidence")


def cell(mean, spread=0.1):
    return {"mean": mean, "interval": [mean - spread, mean + spread]}


def documents(shift=0.0):
    parts = {}
    for domain in ("py", "man"):
        sizes = [100.0] * 6
        bits = {m: 2.0 + 0.1 * i + shift for i, m in enumerate(METHODS)}
        parts[domain] = {
            "clusters": [f"{domain}/{i}" for i in range(6)],
            "windows": [2.0] * 6,
            "bytes": sizes,
            "log_prob": {m: [-b * 100 * 0.6931] * 6 for m, b in bits.items()},
            "asked": [2.0] * 6,
            "correct": {m: [1.0 + shift] * 6 for m in METHODS},
        }
    return parts


def scored(path, *, seed=0, shift=0.0, models=(), drawn=None):
    table = {
        domain: {m: cell(2.0 + 0.1 * i + shift) for i, m in enumerate(METHODS)}
        for domain in ("py", "man", "mean")
    }
    steady = {d: {"emfuse": [0.5, 0.5], "evidence": [0.9, 0.1]} for d in ("py", "man")}
    result = {
        "mode": "score",
        "experts": ["expert-py", "expert-man"],
        "models": [],
        "rules": ["emfuse", "evidence"],
        "bits_per_byte": table,
        "baseline": "emfuse",
        "difference": {
            key: {d: {m: cell(-0.25) for m in METHODS} for d in ("py", "man", "mean")}
            for key in ("bits_per_byte", "accuracy")
        },
        "accuracy": {d: {m: cell(0.5) for m in METHODS} for d in ("py", "man", "mean")},
        "weights": steady,
        "divergence": steady | {"man": {"emfuse": [None, 0.1], "evidence": [0.2, 0.3]}},
        "drawn": drawn,
        "documents": documents(shift),
        "passages": [passage()],
    }
    config = {
        "seed": seed,
        "run_dir": str(path),
        "experts": [f"runs/{seed}"],
        "score": f"runs/{seed}",
        "scoring": {"models": [f"runs/{seed}/models/{m}" for m in models]},
    }
    return write(path, "fuse_llm", config, result)


def write(path, kind, config, result):
    path.mkdir(parents=True)
    artifacts.write_json(path / "config.json", {"kind": kind, "config": config})
    artifacts.write_json(path / "result.json", result)
    return path


def passage(**changes):
    return {
        "rule": "emselect",
        "moves": True,
        "prompt": "def ",
        "token_texts": ["x```", "\x1b[2J"],
        "log_probs": [-0.1, -0.2],
        "weights": [[1.0, 0.0], [0.0, 1.0]],
        "expert_log_probs": [[-1.0, -2.0], [-1.0, None]],
        **changes,
    }


def make(tmp_path, *paths):
    out = tmp_path / "report"
    runs = f"--runs={','.join(map(str, paths))}"
    assert report.main(["report", runs, f"--out={out}"]) == 0
    content = artifacts.read_json(out / "report.json")
    return (out / "report.md").read_text(), content["sections"]


def test_the_matrix_has_intervals_and_a_picture(tmp_path):
    drawn = {
        "num_texts": 6,
        "num_tokens": 5,
        "nats": {"expert-py": cell(1.0), "bound": {"mean": 2.0, "interval": None}},
    }
    text, sections = make(tmp_path, scored(tmp_path / "scores", drawn=drawn))
    rows = sections["Bits per byte: scores"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert rows[2]["py"] == cell(2.2)
    assert "**2.000 [1.900, 2.100]**" in text
    assert "py 12 windows in 6" in text
    assert "mean − emfuse" in text
    assert rows[3]["difference"] == cell(-0.25)
    assert "expert-py 1.00 [0.90, 1.10], bound 2.00 (of EMSelect" in text
    assert "Right answers: scores" in sections
    weights = sections["Weights: scores"]
    assert weights[0]["weights"] == "0.50 / 0.50"
    assert weights[1]["divergence"] == "∞ / 0.10"
    assert f"[scores]({tmp_path}/scores/mixed.html)" in text
    picture = tmp_path / "report" / "figures" / "scores_bits_per_byte.png"
    assert matplotlib.image.imread(picture).std() > 0.05


def test_training_seeds_of_one_study_have_one_table(tmp_path):
    runs = [
        scored(tmp_path / f"scores-seed{s}", seed=s, shift=0.2 * (s - 1))
        for s in range(3)
    ]
    _, sections = make(tmp_path, *runs)
    rows = sections["Bits per byte: scores"]
    assert rows[0]["py"]["mean"] == pytest.approx(2.0, rel=1e-3)
    low, high = rows[0]["py"]["interval"]
    # All documents are alike here: what is left is the spread over seeds.
    assert low == pytest.approx(1.8, rel=1e-3)
    assert high == pytest.approx(2.2, rel=1e-3)
    # What all seeds share is not in a difference.
    assert rows[3]["difference"]["interval"] == pytest.approx([0.1, 0.1], abs=1e-3)


def test_runs_with_other_models_are_not_pooled(tmp_path):
    one = scored(tmp_path / "one")
    two = scored(tmp_path / "two", seed=1, models=("soup",))
    _, sections = make(tmp_path, one, two)
    assert {"Bits per byte: one", "Bits per byte: two"} <= set(sections)


def test_text_is_shown_with_its_experts(tmp_path):
    result = {"mode": "text", "experts": ["expert-py", "b"], "passages": [passage()]}
    text, _ = make(tmp_path, write(tmp_path / "text", "fuse_llm", {}, result))
    assert "````text\ndef ⟦py⟧x```⟦b⟧␛[2J\n````" in text


def test_training_and_tasks(tmp_path):
    trained = {
        "num_parameters": 1234,
        "models": {"base": {"num_steps": 10}},
        "bits_per_byte": {"base": {"py": 2.5, "mixed": 2.75}},
        "cpu_seconds": {"base": 3.2},
    }
    path = write(tmp_path / "lm", "train_lm_experts", {}, trained)
    (path / "training" / "base").mkdir(parents=True)
    (path / "training" / "base" / "metrics.jsonl").write_text(
        '{"step": 5, "loss": 4.0}\n{"step": 10, "loss": 3.0}\n'
    )
    metrics = {
        "arc": {
            "acc": {"mean": 0.5, "stderr": 0.1},
            "ppl": cell(9.0) | {"stderr": None},
        }
    }
    tasks = {"mode": "tasks", "experts": ["a"], "tasks": {"emfuse": metrics}}
    other = write(tmp_path / "tasks", "fuse_llm", {}, tasks)
    text, sections = make(tmp_path, path, other)
    assert sections["Training of lm"] == [
        {"model": "base", "updates": 10, "cpu_seconds": 3.2, "py": 2.5, "mixed": 2.75}
    ]
    assert (tmp_path / "report" / "figures" / "lm_training.png").exists()
    assert "1,234 parameters" in text
    (row,) = sections["Tasks: tasks"]
    assert row["arc acc"]["interval"] == pytest.approx([0.304, 0.696])
    assert row["arc ppl"]["interval"] is None


def test_the_heat_map_marks_the_best_of_either_kind(tmp_path):
    table = {"a": {"x": cell(1.0), "y": {"mean": 2.0, "interval": None}}}
    for best in ("min", "max"):
        path = _lm_plots.domain_matrix({"table": table}, tmp_path / best, best=best)
        assert matplotlib.image.imread(path).std() > 0.05


def test_runs_without_language_models_have_no_such_sections(tmp_path):
    run = _gather.RunFiles(tmp_path, _gather.MODEL, {})
    assert _lm_report.sections([run], tmp_path) == []
