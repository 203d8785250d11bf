"""Intervals of bits per byte: clusters stay together, coverage is what it says."""

import numpy as np
import pytest

from experiments import _lm_intervals, _lm_matrix
from experiments._lm import Window


def window(*documents, text="four", distractors=()):
    return Window(
        ("d",) * len(documents), documents, (0,), (1,), 0, "", text, distractors
    )


def test_windows_that_share_a_document_are_one_cluster():
    windows = [
        window("a"),
        window("b"),
        window("a", "c"),
        window("d", "b"),
        window("e"),
    ]
    labels = _lm_intervals.cluster_labels(windows)
    groups = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, set()).add(index)
    assert sorted(map(sorted, groups.values())) == [[0, 2], [1, 3], [4]]


def test_sums_by_cluster():
    windows = [window("a"), window("b", text="eightfold"), window("a", text="é")]
    log_probs = {"m": np.array([-1.0, -2.0, -4.0])}
    part = _lm_intervals.summarize_file(windows, log_probs)
    assert part == {
        "clusters": ["a", "b"],
        "windows": [2.0, 1.0],
        "bytes": [6.0, 9.0],
        "log_prob": {"m": [-5.0, -2.0]},
    }
    asked = [window("a", distractors=(1,)), window("a", distractors=(0,))]
    part = _lm_intervals.summarize_file(
        asked, {"m": np.zeros(2)}, {"m": np.array([True, False])}
    )
    assert (part["asked"], part["correct"]) == ([2.0], {"m": [1.0]})


def file(log_probs, sizes):
    names = [str(i) for i in range(len(sizes))]
    return {"clusters": names, "bytes": list(sizes), "log_prob": log_probs}


def test_the_mean_over_domains_leaves_mixed_text_out():
    nats = -np.log(2.0)
    files = {
        "a": [file({"m": [nats * 8, nats * 8]}, [4, 4])],
        "b": [file({"m": [nats * 4, nats * 4]}, [4, 4])],
        "mixed": [file({"m": [nats * 40]}, [4])],
    }
    table, apart = _lm_intervals.bits_per_byte_table(files)
    assert {d: cells["m"]["mean"] for d, cells in table.items()} == pytest.approx(
        {"a": 2.0, "b": 1.0, "mixed": 10.0, "mean": 1.5}
    )
    assert table["a"]["m"]["interval"] == pytest.approx([2.0, 2.0])
    assert (
        table["mixed"]["m"]["interval"] is None
    )  # one document says nothing of others
    assert apart == {}
    assert _lm_intervals.accuracy_table(files) == ({}, {})


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    hits, widths, count = 0, [], 400
    for seed in range(count):
        # Documents differ in length and in how hard they are.
        sizes = rng.integers(50, 150, size=30)
        bits = rng.normal(2.0, 0.5, size=30)
        files = {"a": [file({"m": -bits * sizes * np.log(2.0)}, sizes)]}
        table, _ = _lm_intervals.bits_per_byte_table(
            files, seed=seed, num_resamples=300
        )
        low, high = table["a"]["m"]["interval"]
        hits += low <= 2.0 <= high
        widths.append(high - low)
    # Percentile intervals of 30 observations are a little short: 0.95 is not reached.
    assert 0.90 <= hits / count <= 0.97
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(30), rel=0.15)


def test_differences_are_drawn_together():
    rng = np.random.default_rng(1)
    sizes = np.full(40, 100)
    hard = rng.normal(2.0, 0.5, size=40)
    better = hard - 0.01 + rng.normal(0.0, 0.005, size=40)
    sums = {
        name: -bits * sizes * np.log(2.0)
        for name, bits in (("base", hard), ("ours", better))
    }
    files = {"a": [file(sums, sizes)]}
    table, apart = _lm_intervals.bits_per_byte_table(files, baseline="base")
    low, high = apart["a"]["ours"]["interval"]
    assert low < high < 0.0
    # Apart the two cannot be told from each other.
    assert table["a"]["ours"]["interval"][1] > table["a"]["base"]["interval"][0]
    with pytest.raises(ValueError, match="'soup' is none of base, ours"):
        _lm_intervals.bits_per_byte_table(files, baseline="soup")


def test_training_seeds_are_resampled_too():
    rng = np.random.default_rng(2)
    sizes = np.full(50, 100)
    bits = rng.normal(2.0, 0.1, size=50)
    seeds = [
        file({"m": -(bits + shift) * sizes * np.log(2.0)}, sizes)
        for shift in (-0.3, 0.0, 0.3)
    ]
    table, _ = _lm_intervals.bits_per_byte_table({"a": seeds})
    alone, _ = _lm_intervals.bits_per_byte_table({"a": seeds[1:2]})
    low, high = table["a"]["m"]["interval"]
    assert table["a"]["m"]["mean"] == pytest.approx(alone["a"]["m"]["mean"])
    assert high - low > 4 * np.ptp(alone["a"]["m"]["interval"])
    other = seeds[0] | {"clusters": seeds[0]["clusters"][::-1]}
    with pytest.raises(ValueError, match="different documents of 'a'"):
        _lm_intervals.bits_per_byte_table({"a": [seeds[0], other]})


def test_plain_text_is_not_the_answer_to_everything():
    """The second continuation is the likeliest after either prompt."""
    own, wrong = {"m": np.array([-10.0, -2.0])}, {"m": np.array([-5.0, -14.0])}
    pairs = np.array([[0, 1], [1, 0]])
    assert own["m"][0] < wrong["m"][0]
    assert _lm_matrix.right_answers(own, wrong, pairs)["m"].tolist() == [True, True]
    # Each is likelier after the other's prompt than after its own.
    worse = {"m": np.array([-1.0, -9.0])}
    assert _lm_matrix.right_answers(own, worse, pairs)["m"].tolist() == [False, False]
    blind = {"m": np.array([-2.0, -10.0])}  # prompts make no difference
    assert _lm_matrix.right_answers(own, blind, pairs)["m"].tolist() == [False, False]
