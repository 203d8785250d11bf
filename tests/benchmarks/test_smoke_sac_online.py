"""The online benchmark runs: interaction, updates and evaluation of two seeds at once."""

import json

import jax
import pytest

from benchmarks import sac_online_brax
from experiments._run import run_main

pytestmark = [
    pytest.mark.slow,
    # brax multiplies matrices by vectors of lower rank.
    pytest.mark.allow_rank_promotion,
    pytest.mark.allow_key_reuse,
    pytest.mark.filterwarnings("ignore"),
]


def test_every_seed_has_a_curve_and_nobody_reaches_the_target_in_no_time(tmp_path):
    jax.devices()  # before the benchmark pins the threads that this would start
    output = tmp_path / "sac_online_brax.json"
    argv = ["sac_online_brax", "--smoke", f"--output={output}"]
    assert run_main(sac_online_brax.main, sac_online_brax.SacOnlineConfig, argv) == 0
    results = json.loads(output.read_text())["results"]
    assert [row["step"] for row in results["curve"]] == [32, 64]
    # Every step is worth one point, and an episode ends after five.
    for row in results["curve"]:
        assert all(1 <= value <= 5 for value in row["return"]), row
    assert results["first_step_at_target"] == [None, None]
    assert results["seeds_at_target"] == 0
