"""The SAC benchmark runs, and compares two implementations of one update."""

import json
import math

import jax
import numpy as np
import pytest

from benchmarks import sac_updates
from emfuse_jax.base import SpaceSpec
from emfuse_jax.policies.sac import SacConfig, sac
from experiments._run import run_main

# The comparison of one update draws the update's own noise a second time.
pytestmark = pytest.mark.allow_key_reuse
TINY = sac_updates.SacUpdatesConfig(hidden=(8, 8), batch_size=16)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    jax.devices()  # before the benchmark pins the threads that this would start
    output = tmp_path_factory.mktemp("bench") / "sac_updates.json"
    argv = ["sac_updates", "--smoke", f"--output={output}", "--repeats=5"]
    assert run_main(sac_updates.main, sac_updates.SacUpdatesConfig, argv) == 0
    return json.loads(output.read_text())


def test_the_document_holds_rates_per_update_of_one_seed(document):
    assert document["question"].startswith("How many SAC updates")
    assert document["provenance"]["versions"]["jax"] == jax.__version__
    ours = document["results"]["contenders"]["ours_2_seeds"]
    assert ours["units_per_call"] == 4  # two seeds, two updates each
    assert ours["compile_seconds"] > 0
    median = ours["rate_per_cpu_second"]["median"]
    assert math.isclose(median, 4 / ours["cpu_seconds"]["median"], rel_tol=0.01)


def test_the_peer_is_measured_or_its_absence_explained(document):
    results = document["results"]
    if "pytorch" not in results["contenders"]:
        assert results["same_computation"].startswith("skipped")
    else:
        assert results["ratio_to_pytorch_of"]["ours_2_seeds"]["median"] > 0


def test_few_repeats_are_refused(capsys):
    argv = ["sac_updates", "--smoke", "--repeats=2"]
    assert run_main(sac_updates.main, sac_updates.SacUpdatesConfig, argv) == 2
    assert "repeats=2" in capsys.readouterr().err


def test_one_update_of_the_peer_is_one_of_ours_and_another_is_refused():
    pytest.importorskip("torch")
    spec = SpaceSpec(TINY.observation_size, TINY.action_size)
    policy = sac(SacConfig(hidden_sizes=TINY.hidden), spec)
    checks = sac_updates.check(TINY, policy)
    assert checks["max_abs_difference"] < 1e-6 < 1e-4 < checks["max_abs_move"]
    other = sac(SacConfig(hidden_sizes=TINY.hidden, discount=0.5), spec)
    with pytest.raises(RuntimeError, match="not compute the same thing"):
        sac_updates.check(TINY, other)


def test_terminated_rows_do_not_bootstrap_in_the_peer():
    rows = sac_updates.transitions(TINY, 100)
    discount = sac_updates.for_torch(rows)["discount"]
    np.testing.assert_array_equal(discount, np.where(rows.terminated, 0.0, 1.0))
    assert 0 < rows.terminated.sum() < 100
