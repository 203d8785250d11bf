"""The benchmark of devices runs, in processes of its own, and says what it measured."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import device_scaling
from emfuse_jax.parallel import make_mesh
from experiments._run import run_main

CONFIG = device_scaling.shrunk(device_scaling.ScalingConfig(repeats=5))


def test_a_process_per_number_of_devices(tmp_path, capfd):
    output = tmp_path / "scaling.json"
    argv = ["device_scaling", "--smoke", "--devices=2", "--workloads=chains"]
    argv += ["--repeats=5", f"--output={output}"]
    config = device_scaling.ScalingConfig
    assert run_main(device_scaling.main, config, argv) == 0
    assert "chains    strong  2 devices" in capfd.readouterr().out
    document = json.loads(output.read_text())
    assert document["question"].startswith("What does spreading work")
    assert document["machine"]["by_devices"]["2"]["threads"] == 1
    curves = document["results"]["workloads"]["chains"]
    assert [curves[kind][0]["rows"] for kind in ("strong", "weak")] == [16, 32]
    for row in (curves["strong"][0], curves["weak"][0]):
        cost = row["cost"]
        assert 0 < cost["min"] <= cost["median"] <= cost["max"]
        assert row["contenders"]["lifted"]["repeats"] == 5


@pytest.mark.parametrize("name", ["training", "rollouts"])
def test_what_is_lifted_is_the_plain_work(name):
    """Traced alone: these two take long to compile."""
    make, _, _ = device_scaling.WORKLOADS[name]
    work = make(CONFIG, 16, make_mesh({"data": 2}))
    plain = jax.eval_shape(work.plain, *work.args)
    lifted = jax.eval_shape(work.lifted, *work.placed)
    assert jax.tree.map(jnp.shape, lifted) == jax.tree.map(jnp.shape, plain)
    devices = [len(x.sharding.device_set) for x in jax.tree.leaves(work.placed)]
    assert set(devices) == {2}


def test_too_many_devices_are_left_out_and_other_numbers_refused():
    many = dataclasses.replace(CONFIG, devices=(64,))
    assert device_scaling.measure(many) == {}
    row = {"devices": 1, "mean": 1.0}
    documents = {
        count: {"workloads": {"chains": {"strong": {**row, "mean": mean}, "weak": row}}}
        for count, mean in ((1, 1.0), (2, 1.5))
    }
    with pytest.raises(ValueError, match=r"chains depends .*1\.0, 1\.5"):
        device_scaling.curves(documents)
