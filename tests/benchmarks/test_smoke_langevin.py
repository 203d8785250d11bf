"""The Langevin benchmark runs, compares like with like, and writes what it measured."""

import json
import math
import os

import jax
import pytest

from benchmarks import _timing, langevin_throughput
from experiments._run import run_main


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "new" / "langevin.json"
    cores = os.sched_getaffinity(0)
    cached = jax.config.jax_enable_compilation_cache
    argv = ["langevin_throughput", "--smoke", f"--output={output}", "--repeats=5"]
    status = run_main(
        langevin_throughput.main, langevin_throughput.ThroughputConfig, argv
    )
    assert status == 0
    assert os.sched_getaffinity(0) == cores  # what was pinned is free again
    assert jax.config.jax_enable_compilation_cache == cached
    return json.loads(output.read_text())


def test_the_document_holds_the_number_and_its_provenance(document):
    assert document["question"].startswith("How many Langevin steps")
    assert document["provenance"]["versions"]["jax"] == jax.__version__
    assert document["machine"]["threads"] == 1
    assert [s["chains"] for s in document["results"]["studies"]] == [6, 20]


def test_every_contender_is_measured_often_enough(document):
    for study in document["results"]["studies"]:
        assert {"ours", "ours_one_block", "blackjax"} <= set(study["contenders"])
        for summary in study["contenders"].values():
            rate = summary["rate_per_cpu_second"]
            assert summary["repeats"] == 5
            assert 0 < rate["min"] <= rate["median"] <= rate["max"] < math.inf
            assert summary["first_call_seconds"] > 0
        assert study["contenders"]["ours"]["compile_seconds"] > 0
        assert study["ratio_of_ours_to"]["blackjax"]["median"] > 0


def test_contenders_sample_the_same_energy(document):
    study = document["results"]["studies"][-1]
    ends = [summary["mean_end_energy"] for summary in study["contenders"].values()]
    assert max(ends) - min(ends) < 0.5


def test_torchebm_is_measured_or_its_absence_explained(document):
    study = document["results"]["studies"][0]
    assert ("torchebm" in study["contenders"]) != study["torchebm"].startswith(
        "skipped"
    )


def test_few_repeats_are_refused(capsys):
    argv = ["langevin_throughput", "--smoke", "--repeats=2"]
    config = langevin_throughput.ThroughputConfig
    assert run_main(langevin_throughput.main, config, argv) == 2
    assert "repeats=2" in capsys.readouterr().err


def test_work_per_step_is_counted_as_the_papers_shapes_say():
    config = langevin_throughput.ThroughputConfig()
    assert langevin_throughput.flops_per_step(config) == 542_720


def test_contenders_take_turns_and_the_ratio_is_per_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    timings = _timing.measure(calls, repeats=5)
    assert order == ["a", "a", "b", "b", *["a", "b"] * 5]
    fast = timings["a"]._replace(cpu=[1.0] * 5)
    slow = timings["b"]._replace(cpu=[2.0, 3.0, 4.0, 3.0, 3.0])
    ratio = _timing.ratio({"a": fast, "b": slow}, "a", "b")
    assert ratio == {"median": 3.0, "min": 2.0, "max": 4.0}
