"""The benchmark of negatives runs; its likelihoods are right where they are known."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import _partition, negatives
from experiments._run import run_main

DIM = 6


@pytest.mark.slow
def test_the_document_holds_costs_errors_and_likelihoods(tmp_path):
    jax.devices()  # before the benchmark pins the threads that this would start
    output = tmp_path / "negatives.json"
    argv = ["negatives", "--smoke", f"--output={output}", "--repeats=5"]
    assert run_main(negatives.main, negatives.NegativesConfig, argv) == 0
    results = json.loads(output.read_text())["results"]
    assert results["step"]["langevin_costs_times"]["proposal"]["median"] > 0
    (domain,) = results["equal_time"]
    for name in ("proposal", "langevin"):
        assert domain[name]["cpu_seconds"] > 0
        assert 0 < domain[name]["one_step"] < 20
        assert math.isfinite(domain[name]["nll"])
        assert 1 <= domain[name]["least_effective_draws"] <= domain[name]["draws"]


def test_few_draws_are_refused(capsys):
    argv = ["negatives", "--smoke", "--draws=10"]
    assert run_main(negatives.main, negatives.NegativesConfig, argv) == 2
    assert "draws=10" in capsys.readouterr().err


def estimate(energy, *, scale, high, box_weight):
    where = _partition.Landscape(energy, jnp.zeros(DIM), jnp.full(DIM, scale))
    box = (-jnp.full(DIM, high), jnp.full(DIM, high))
    return jax.jit(
        lambda key: _partition.two_stages(key, where, box, 4000, box_weight)
    )(jax.random.key(0))


def test_the_partition_function_of_a_gaussian():
    """Far from the start and much narrower: the first stage has to find it."""
    std = 0.05

    def energy(y):
        return 0.5 * jnp.sum(jnp.square((y - 0.4) / std), axis=-1) + 3.0

    found = estimate(energy, scale=0.3, high=1.0, box_weight=0.1)
    expected = DIM * (math.log(std) + 0.5 * math.log(2 * math.pi)) - 3.0
    assert float(found.effective_sample_size) > 400
    error = abs(float(found.log_partition) - expected)
    assert error < 4 * float(found.standard_error) < 0.2


def test_the_partition_function_of_a_flat_energy_is_the_volume_of_its_box():
    def energy(y):
        inside = jnp.all(jnp.abs(y) <= 1.1, axis=-1)
        return jnp.where(inside, 2.0, jnp.inf)

    found = estimate(energy, scale=1.0, high=1.1, box_weight=0.5)
    expected = DIM * math.log(2.2) - 2.0
    error = abs(float(found.log_partition) - expected)
    assert float(found.effective_sample_size) > 100
    assert error < 4 * float(found.standard_error) < 0.5


def test_both_recipes_have_the_same_sizes():
    recipes = negatives.recipes(negatives.NegativesConfig())
    sizes = {(r.energy_sizes, r.state_features, r.num_lags) for r in recipes.values()}
    assert len(sizes) == 1
    assert recipes["proposal"].head_phase == 0.0  # the dearer of the two phases
