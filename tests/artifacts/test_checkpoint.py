"""Checkpoints return the bits that were saved, or say that they cannot."""

import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emfuse_jax.artifacts import checkpoint

ROOT = pathlib.Path(__file__).parents[2]


class State(NamedTuple):
    params: Any
    optimizer: Any
    key: Any
    count: Any
    nothing: Any = None


def _state(seed=0, width=4):
    w = jax.random.normal(jax.random.key(seed), (3, width))
    params = {"w": w, "b": [jnp.zeros(2, jnp.bfloat16), jnp.arange(3)]}
    optimizer = optax.adam(1e-3).init({"w": w})
    return State(params, optimizer, jax.random.key(seed + 1), seed)


def _fill(folder, scores, keep=3):
    for step, score in enumerate(scores, start=1):
        checkpoint.save(folder, step, _state(step), score=score, keep=keep)


def test_round_trip_is_exact(tmp_path):
    state = _state()
    checkpoint.save(tmp_path / "new" / "folder", 3, state)
    for like in (state, _state(7), jax.eval_shape(lambda: state)):
        again = checkpoint.restore(tmp_path / "new" / "folder", like)
        assert jax.tree.structure(again) == jax.tree.structure(state)
        assert checkpoint.tree_digest(again) == checkpoint.tree_digest(state)
    assert checkpoint.tree_digest(_state(7)) != checkpoint.tree_digest(state)


def test_the_digest_sees_names_types_and_single_bits():
    tree = {"a": jnp.zeros(2), "b": jnp.ones(2)}
    seen = {
        checkpoint.tree_digest(other)
        for other in (
            tree,
            {"a": tree["b"], "b": tree["a"]},
            {"a": jnp.zeros(2, jnp.int32), "b": tree["b"]},
            {"a": jnp.zeros((2, 1)), "b": tree["b"]},
            {"a": jnp.array([0.0, -0.0]), "b": tree["b"]},
        )
    }
    assert len(seen) == 5


def test_numbers_come_back_as_the_template_has_them(tmp_path):
    checkpoint.save(tmp_path, 1, {"count": 3, "rate": 0.1, "on": True})
    again = checkpoint.restore(tmp_path, {"count": 0, "rate": 0.0, "on": False})
    assert (again["count"], again["on"]) == (3, True)
    assert np.float32(again["rate"]) == np.float32(0.1)


def test_restores_onto_other_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    values = jnp.arange(16.0)
    checkpoint.save(tmp_path, 1, {"x": values})
    like = {"x": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=split)}
    again = checkpoint.restore(tmp_path, like)["x"]
    assert again.sharding == split
    np.testing.assert_array_equal(again, values)
    checkpoint.save(tmp_path, 2, {"x": again})
    one = checkpoint.restore(tmp_path, {"x": values})["x"]
    assert len(one.devices()) == 1


def test_keeps_the_newest_and_the_best(tmp_path):
    _fill(tmp_path, [0.0, 5.0, float("nan"), 1.0, None, 2.0], keep=2)
    assert checkpoint.steps(tmp_path) == [2, 5, 6]
    assert checkpoint.best_step(tmp_path) == 2
    best = checkpoint.restore(tmp_path, _state(), step=2)
    assert checkpoint.tree_digest(best) == checkpoint.tree_digest(_state(2))
    assert checkpoint.read_meta(tmp_path, 2)["score"] == 5.0


def test_without_scores_there_is_no_best(tmp_path):
    assert checkpoint.best_step(tmp_path) is None
    assert checkpoint.restore_latest(tmp_path, _state()) is None
    _fill(tmp_path, [None, None], keep=1)
    assert checkpoint.steps(tmp_path) == [2]
    assert checkpoint.best_step(tmp_path) is None


# Orbax's event loop is closed while its readers still report the truncated files.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_falls_back_to_the_newest_good_step(tmp_path):
    _fill(tmp_path, [None] * 5, keep=5)
    for path in pathlib.Path(tmp_path, "4", "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:20])
    pathlib.Path(tmp_path, "5", "state", "_METADATA").unlink()
    (tmp_path / "3" / "meta" / "metadata").write_text('{"step": ')
    found = checkpoint.restore_latest(tmp_path, _state())
    assert found is not None
    assert found.step == 2
    assert sorted(found.damaged) == [3, 4, 5]
    assert checkpoint.tree_digest(found.tree) == checkpoint.tree_digest(_state(2))
    assert checkpoint.steps(tmp_path) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.restore(tmp_path, _state(), step=4)
    checkpoint.restore_latest(tmp_path, _state(), discard_damaged=True)
    assert checkpoint.steps(tmp_path) == [1, 2]
    checkpoint.save(tmp_path, 3, _state(3))  # the run goes on
    assert checkpoint.restore_latest(tmp_path, _state()).step == 3


def test_a_flipped_bit_is_found_by_the_digest(tmp_path):
    tree = {"noise": jax.random.normal(jax.random.key(0), (10_000,))}
    checkpoint.save(tmp_path, 1, tree)
    files = pathlib.Path(tmp_path, "1", "state").rglob("d/*")
    data = max(files, key=lambda path: path.stat().st_size)
    bits = bytearray(data.read_bytes())
    bits[len(bits) // 2] ^= 1
    data.write_bytes(bits)
    # Orbax itself restores the wrong values without a word.
    with pytest.raises(ValueError, match="the digest does not match"):
        checkpoint.restore(tmp_path, tree, step=1)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    _fill(tmp_path, [None])
    (tmp_path / "1" / "meta" / "metadata").unlink()
    with pytest.raises(ValueError, match="every checkpoint"):
        checkpoint.restore_latest(tmp_path, _state())


def test_another_architecture_is_an_error_that_names_the_leaf(tmp_path):
    _fill(tmp_path, [None])
    with pytest.raises(
        ValueError, match=r"leaf params\.w is float32\[3, 4\].*\[3, 5\]"
    ):
        checkpoint.restore(tmp_path, _state(width=5))
    other = _state()._replace(params={"v": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"leaf params\.b\.0 .*absent in the model"):
        checkpoint.restore_latest(tmp_path, other, discard_damaged=True)
    assert checkpoint.steps(tmp_path) == [1]


def test_only_newer_steps_can_be_saved(tmp_path):
    _fill(tmp_path, [None, None])
    checkpoint.save(tmp_path, 2, _state(2))  # the same again: nothing to do
    for step, state in ((2, _state(9)), (1, _state(1))):
        with pytest.raises(ValueError, match="not newer than step 2"):
            checkpoint.save(tmp_path, step, state)
    checkpoint.delete_after(tmp_path, 1)
    checkpoint.save(tmp_path, 2, _state(9))
    again = checkpoint.restore(tmp_path, _state())
    assert checkpoint.tree_digest(again) == checkpoint.tree_digest(_state(9))


def test_missing_steps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.restore(tmp_path, _state())
    _fill(tmp_path, [None])
    with pytest.raises(FileNotFoundError, match=r"step 7.*there are \[1\]"):
        checkpoint.restore(tmp_path, _state(), step=7)


SAVE_FOREVER = textwrap.dedent("""
    import sys
    import jax, jax.numpy as jnp
    from emfuse_jax.artifacts import checkpoint

    def tree(step):
        return [jnp.full((200, 200), step + i, jnp.float32) for i in range(12)]

    found = checkpoint.restore_latest(sys.argv[1], tree(0), discard_damaged=True)
    step = 0 if found is None else found.step
    if found is not None:
        assert checkpoint.tree_digest(found.tree) == checkpoint.tree_digest(tree(step))
        assert found.damaged == {}, found.damaged
    print(step, flush=True)
    while True:
        step += 1
        checkpoint.save(sys.argv[1], step, tree(step))
        print(step, flush=True)
""")


def _killed_in_mid_save(folder):
    """Runs the loop above until it is writing; returns the last step it reported."""
    command = [sys.executable, "-c", SAVE_FOREVER, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline(), process.stdout.readline()]
    deadline = time.monotonic() + 60
    while not list(folder.glob("*tmp*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    lines += process.communicate()[0].splitlines()
    return int([line for line in lines if line.strip()][-1])


def test_kill_in_mid_save_loses_no_finished_step(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    leftovers = 0
    for _ in range(6):
        reported = _killed_in_mid_save(folder)
        leftovers += bool(list(folder.glob("*tmp*")))
        # The save under way may have been finished, but not yet reported.
        assert max(checkpoint.steps(folder)) in (reported, reported + 1)
        like = [jnp.zeros((200, 200))] * 12
        found = checkpoint.restore_latest(folder, like)
        assert found.damaged == {}
        assert float(found.tree[3][0, 0]) == found.step + 3
        if leftovers == 2:
            break
    assert leftovers, "no kill hit a half-written checkpoint: nothing was tested"
