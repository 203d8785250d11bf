"""The benchmark of fusion's cost runs, and its two layouts imagine the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fusion_cost
from emfuse_jax.dynamics import fuse_dynamics, uncertainty_weights
from emfuse_jax.tree import stack
from experiments._run import run_main


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    jax.devices()  # before the benchmark pins the threads that this would start
    output = tmp_path_factory.mktemp("bench") / "fusion_cost.json"
    argv = ["fusion_cost", "--smoke", f"--output={output}", "--repeats=5"]
    assert run_main(fusion_cost.main, fusion_cost.FusionCostConfig, argv) == 0
    return json.loads(output.read_text())


def test_every_number_of_experts_and_slices_is_measured(document):
    contenders = document["results"]["contenders"]
    assert set(contenders) == {"stacked_1", "stacked_2", "tuple_2", "slices_1"}
    assert contenders["stacked_1"]["cost_ratio"]["median"] == 1.0
    assert contenders["tuple_2"]["cost_ratio_to"] == "stacked_1"
    for summary in contenders.values():
        assert summary["units_per_call"] == 12 * 2
        assert summary["rate_per_cpu_second"]["median"] > 0


def test_parameters_are_those_of_all_experts(document):
    count = {n: c["parameters"] for n, c in document["results"]["contenders"].items()}
    assert count["stacked_2"] == count["tuple_2"] == 2 * count["stacked_1"]


def test_both_layouts_imagine_the_same():
    model = dataclasses.replace(
        fusion_cost.FusionCostConfig().model, **fusion_cost.TINY
    )
    config = dataclasses.replace(
        fusion_cost.FusionCostConfig(), model=model, **fusion_cost.SMOKE
    )
    dynamics = fusion_cost.architecture(config, 2)
    members = fusion_cost.experts(config, dynamics, 2, 2)
    history = fusion_cost.windows(config, 2)

    def predictor(models):
        predict = jax.jit(fuse_dynamics(models, uncertainty_weights()).predict)
        return lambda params: predict(params, jax.random.key(0), history)[0]

    stacked, listed = (predictor(m) for m in (dynamics.model, [dynamics.model] * 2))
    one = stacked(stack(members))
    np.testing.assert_allclose(one, listed(members), rtol=1e-4, atol=1e-4)
    swapped = stacked(stack([members[0]] * 2))
    assert float(jnp.max(jnp.abs(one - swapped))) > 0.1
