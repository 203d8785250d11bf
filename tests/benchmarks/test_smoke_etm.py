"""The benchmarks of the energy transition model run, and compare like with like."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import _etm, etm_prediction, etm_training
from experiments._run import run_main

# The comparison of one step draws the update's own chain starts a second time.
pytestmark = pytest.mark.allow_key_reuse
SCRIPTS = {
    "etm_training": (etm_training.main, etm_training.EtmTrainingConfig),
    "etm_prediction": (etm_prediction.main, etm_prediction.EtmPredictionConfig),
}


@pytest.fixture(scope="module", params=SCRIPTS)
def document(request, tmp_path_factory):
    jax.devices()  # before the benchmark pins the threads that this would start
    output = tmp_path_factory.mktemp("bench") / f"{request.param}.json"
    argv = [request.param, "--smoke", f"--output={output}", "--repeats=5"]
    assert run_main(*SCRIPTS[request.param], argv) == 0
    return json.loads(output.read_text())


def test_the_document_holds_rates_and_the_comparison(document):
    results = document["results"]
    assert document["provenance"]["versions"]["jax"] == jax.__version__
    assert results["contenders"]["ours"]["repeats"] == 5
    assert results["contenders"]["ours"]["compile_seconds"] > 0
    assert results["gemm_gflop_per_cpu_second"]["jax"]["best"] > 0
    if "pytorch" not in results["contenders"]:
        assert results["same_computation"].startswith("skipped")
        return
    assert results["ratio_of_ours_to"]["pytorch"]["median"] > 0
    differences = [
        value
        for name, value in results["same_computation"].items()
        if name.startswith("relative")
    ]
    assert differences
    assert max(differences) < 1e-4


def test_the_compared_step_exercises_chain_and_penalty():
    """Where nothing moved and nothing was penalised, agreement would mean nothing."""
    pytest.importorskip("torch")
    config = etm_training.shrink(etm_training.EtmTrainingConfig())
    assert etm_training.check(config)["penalty"] > 1.0
    other = dataclasses.replace(config.model, penalty_margin=0.0)
    with pytest.MonkeyPatch.context() as patch:
        peer = etm_training.peer_training
        patch.setattr(
            etm_training, "peer_training", lambda given, model: peer(given, other)
        )
        with pytest.raises(RuntimeError, match="not compute the same thing"):
            etm_training.check(config)


def test_published_sizes_are_the_defaults():
    training = etm_training.EtmTrainingConfig().model
    assert training.energy_sizes == etm_prediction.EtmPredictionConfig().hidden
    assert training.energy_sizes == (200,) * 4
    assert (training.batch_size, training.num_negatives) == (1024, 16)
    assert (training.chain_steps, training.negatives) == (50, "langevin")
    sampling = etm_prediction.EtmPredictionConfig().sampling
    assert (sampling.num_steps, sampling.noise, sampling.drift_clip) == (30, 0.5, 0.5)


def test_disagreement_is_refused():
    checks = {"relative_loss": 0.5, "penalty": 3.0}
    with pytest.raises(RuntimeError, match=r"relative_loss is 0\.5"):
        _etm.require_agreement(checks)
    with pytest.raises(RuntimeError, match="relative_loss is nan"):
        _etm.require_agreement({"relative_loss": np.nan})
    assert _etm.require_agreement({"relative_loss": 1e-5, "penalty": 3.0})
