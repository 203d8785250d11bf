"""The Particle study runs, keeps what it has done, and counts successes with intervals."""

import json

import numpy as np
import pytest

from benchmarks import _particle, particle
from emfuse_jax.base import SpaceSpec
from experiments._run import run_main

pytestmark = pytest.mark.allow_key_reuse


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("particle")
    return [
        "particle",
        "--dims=1",
        "--methods=mse",
        "--demonstrations=8",
        "--scale=0.001",
        "--episodes=20",
        "--step_function=false",
        f"--work={folder / 'parts'}",
        f"--output={folder / 'particle.json'}",
    ]


def run(argv):
    assert run_main(particle.main, particle.ParticleStudyConfig, argv) == 0
    return json.loads(open(argv[-1].partition("=")[2]).read())


def test_the_study_runs_once_and_remembers(argv, capsys):
    document = run(argv)
    row = document["results"]["by_dimension"]["1"]
    assert row["oracle"]["success"]["share"] == 1.0
    assert row["oracle"]["pushed"]["share"] == 1.0
    forward = row["mse"]["variants"]["forward"]
    for case in ("success", "long", "pushed"):
        low, high = forward[case]["interval"]
        assert 0 <= low <= forward[case]["share"] <= high <= 1
        assert forward[case]["episodes"] == 20
    timed = document["results"]["time_per_action"]["1 rows"]["mse forward"]
    assert timed["cpu_ms_per_executed_action"] > 0
    assert "20/20" in capsys.readouterr().out
    again = run(argv)
    assert "20/20" not in capsys.readouterr().out  # nothing was trained again
    assert again["results"]["by_dimension"] == document["results"]["by_dimension"]


def test_intervals_are_wilsons():
    half = particle.proportion(50, 100)
    np.testing.assert_allclose(half["interval"], [0.4038, 0.5962], atol=1e-4)
    np.testing.assert_allclose(
        particle.proportion(100, 100)["interval"], [0.9630, 1.0], atol=1e-4
    )


def test_bad_settings_are_refused(capsys):
    config = particle.ParticleStudyConfig
    assert run_main(particle.main, config, ["particle", "--methods=other"]) == 2
    assert "methods are mse" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pushed_steps=81"):
        particle.check_lengths(config(pushed_steps=81), 5)


def test_the_cost_of_an_action_is_that_of_its_settings():
    method = _particle.METHODS["ibc"]
    variants = method.variants(method.policy(SpaceSpec(12, 2), 10), 2)
    cost = {name: cost for name, (_, cost) in variants.items()}
    assert cost["langevin"]["sequential"] == _particle.IBC.chain_steps
    assert cost["langevin"]["rows"] == _particle.IBC.num_samples
    assert cost["derivative_free"]["sequential"] == _particle.SEARCH.search_steps + 1
