"""The decoding benchmark runs, compares like with like, and counts its programs."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from benchmarks import llm_decode
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.model import language_model
from emfuse_jax.llm.rules import uniform
from emfuse_jax.tree import stack
from experiments._run import run_main

HAS_PEER = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    jax.devices()  # before the benchmark pins the threads that this would start
    output = tmp_path_factory.mktemp("bench") / "llm_decode.json"
    argv = ["llm_decode", "--smoke", f"--output={output}", "--repeats=5"]
    assert run_main(llm_decode.main, llm_decode.LlmDecodeConfig, argv) == 0
    return json.loads(output.read_text())


def test_every_contender_is_measured(document):
    (study,) = document["results"]["beside_transformers"].values()
    ours = {"emfuse", "emselect", "emfuse_tuple"}
    assert set(study["contenders"]) == (ours | {"transformers"} if HAS_PEER else ours)
    assert study["ratio_of_emfuse_to"]["emselect"]["median"] > 0
    for summary in study["contenders"].values():
        assert summary["tokens_per_call"] == 12 * 2
        rate = summary["tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]


def test_the_peer_decodes_the_same_tokens(document):
    (study,) = document["results"]["beside_transformers"].values()
    if not HAS_PEER:
        assert study["same_computation"].startswith("skipped")
        return
    for same in study["same_computation"].values():
        assert same["equal_tokens"] == 12 * 2
        assert same["distinct_tokens"] > 3  # a constant would be equal too easily


def test_costs_and_programs_are_counted(document):
    costs = document["results"]["cost_of_experts"]["tiny"]
    assert set(costs) == {"1", "2"}
    assert costs["2"]["cost_in_units_of_one_expert"]["median"] > 0
    found = document["results"]["compilations"]
    assert found == {"buckets": 2, "prefill": 2, "decode": 2}


def test_other_weights_are_refused_as_another_computation():
    """The comparison of tokens tells a fusion from its first two experts."""
    size = llm_decode.SIZES["tiny"]
    config = llm_decode.architecture(size, 5)
    members = llm_decode.random_experts(config, 3)
    tokens = llm_decode.prompts(config, 2, 5)

    def decoded(some):
        fused = fuse_language_models(
            language_model(config), uniform(), num_models=len(some)
        )
        call, _ = llm_decode.compiled_decode(fused, stack(some), tokens, 12)
        return np.asarray(call().tokens)

    three = decoded(members)
    assert llm_decode.compare_tokens(three, three)["equal_tokens"] == 24
    with pytest.raises(RuntimeError, match="do not compute the same thing"):
        llm_decode.compare_tokens(three, decoded(members[:2]))


def test_sizes_are_those_that_were_asked_for():
    sizes = llm_decode.SIZES
    assert sizes["big"][:2] == (8, 512)
    assert sizes["big"].vocab_size == 32_000
    assert sizes["small"][:2] == (4, 128)
    with pytest.raises(ValueError, match="huge"):
        llm_decode.LlmDecodeConfig(sizes=("huge",))
