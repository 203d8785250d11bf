"""A dry run says what would be trained, and leaves nothing behind."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _tiny_runs as tiny
import _toy_main as toy_main
from emfuse_jax import loops
from experiments import _dry_run, demo, train_dynamics, train_lm_experts


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setenv("EMFUSE_JAX_CACHE", "0")
    monkeypatch.setattr(_dry_run, "_SECONDS", 0.01)


def test_what_is_said_of_the_toy(tmp_path, capsys):
    path = tmp_path / "run"
    assert toy_main.main(["toy", f"--run_dir={path}", "--dry_run"]) == 0
    assert not path.exists()
    text = capsys.readouterr().out
    assert "dry run of toy: nothing is written or trained" in text
    assert "parameters: 3 numbers\n  -: float32[3]" in text
    assert "data: 1.02 kB\n  0: float32[64, 3]\n  1: float32[64]" in text
    assert "batch\n  0: float32[8, 3]" in text
    # The product of the forward pass and that of its gradient: 8 rows, 3 columns.
    assert "96 in matrix products" in text
    assert re.search(r"memory: \d.* kB at the most: 1.* kB of state and data", text)
    assert re.search(r"time: \d.* per update .* for 40, if that holds", text)


def test_a_run_that_is_there_stays_as_it_is(tmp_path, capsys):
    path = tmp_path / "run"
    assert toy_main.main(["toy", f"--run_dir={path}"]) == 0
    before = tiny.snapshot(path)
    assert toy_main.main(["toy", f"--run_dir={path}", "--dry_run"]) == 0
    assert "done already: 40 of 40" in capsys.readouterr().out
    # What the command itself would refuse is refused.
    assert toy_main.main(["toy", f"--run_dir={path}", "--dry_run", "--seed=1"]) == 2
    assert tiny.snapshot(path) == before


def test_the_timed_updates_are_those_of_fit():
    learner = toy_main.toy_learner(toy_main.ToyConfig(run_dir="x"))
    data = (jnp.ones((8, 3)), jnp.arange(8.0))
    for key in (jax.random.key(0), jax.random.split(jax.random.key(1))):
        init = jax.vmap(learner.init) if key.ndim else learner.init
        state = init(jax.random.clone(key))
        options = (learner, state, lambda key, data: data)
        fitted = loops.fit(jax.random.clone(key), *options, 4, data=data, chunk=2)
        expected = fitted[0]
        program = _dry_run.several_updates(key, learner, options[2])
        found = program(key, state, data, jnp.asarray(4))
        np.testing.assert_allclose(found.params, expected.params, rtol=1e-6)


def test_products_in_loops_are_counted_as_often_as_they_run():
    def chain(x):
        step = lambda c, _: (jnp.tanh(c @ c), None)  # noqa: E731
        x = jax.lax.scan(step, x, length=5)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    x = jnp.ones((4, 4))
    one = 2 * 4**3
    assert _dry_run.product_flops(jax.make_jaxpr(chain)(x).jaxpr) == 7 * one
    # XLA's own count is below even the loop's.
    assert jax.jit(chain).lower(x).cost_analysis()["flops"] < 5 * one

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID")

    jaxpr = jax.make_jaxpr(convolve)(jnp.ones((2, 3, 10)), jnp.ones((5, 3, 4))).jaxpr
    assert _dry_run.product_flops(jaxpr) == 2 * (2 * 5 * 7) * (3 * 4)


def test_commands_write_nothing(tmp_path, capsys, monkeypatch):
    cost = _dry_run.Cost(1.0, 1.0, {}, 1.0, 1.0, "not timed")
    monkeypatch.setattr(_dry_run, "measure", lambda *args: cost)
    data = tiny.write_data(tmp_path / "data.hdf5")
    before = tiny.snapshot(tmp_path)
    texts = tmp_path.parent / "texts"
    texts.mkdir(exist_ok=True)
    for name in ("a", "b"):
        for number in range(8):
            text = f"{name} says {number} things. " * 40
            (texts / f"{name}{number}.txt").write_text(text)
    lm = (
        *(f"--domains=a={texts}/a*.txt,b={texts}/b*.txt", "--tokenizer=byte"),
        *("--model.num_layers=1", "--model.hidden_size=8", "--model.num_heads=1"),
        *("--model.num_kv_heads=1", "--window=16", "--prompt=4", "--batch_size=2"),
        *("--base_steps=20", "--expert_steps=10", "--chunk=10", "--nogeneralist"),
    )
    for module, flags, words in (
        (train_dynamics, (f"--data={data}", *tiny.MODEL), "history.action: float32[2,"),
        (train_lm_experts, lm, "for 40, if that holds"),
        (demo, ("--preset=smoke",), "policy-fused (to do)\n  python -m experiments."),
    ):
        flags = (*flags, f"--run_dir={tmp_path}/run", "--dry_run")
        assert module.main([module.__name__, *flags]) == 0
        text = capsys.readouterr().out
        assert "nothing is written or trained" in text
        assert words in text
        assert tiny.snapshot(tmp_path) == before
        assert not (tmp_path / "run").exists()


def test_a_demo_hands_on_what_to_do_about_divergence(tmp_path, capsys):
    flags = (f"--run_dir={tmp_path}/run", "--dry_run", "--on_divergence=rollback")
    assert demo.main(["demo", *flags]) == 0
    commands = [
        line for line in capsys.readouterr().out.splitlines() if "python -m" in line
    ]
    trains = [line for line in commands if "experiments.train_" in line]
    assert len(trains) == 6
    assert all(line.endswith("--on_divergence=rollback") for line in trains)
    assert sum("--on_divergence" in line for line in commands) == len(trains)
