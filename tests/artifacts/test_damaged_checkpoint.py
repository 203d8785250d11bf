"""Whatever happens to a file of a checkpoint, wrong values are never returned."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import artifacts


def tree(step):
    """Random numbers, which no compression folds away."""
    key = jax.random.key(step)
    return {
        "w": jax.random.normal(key, (40, 40)),
        "count": jnp.asarray(step),
        "key": key,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2; the first one is the better one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    artifacts.save(folder, 1, tree(1), score=2.0, config={"a": 1})
    artifacts.save(folder, 2, tree(2), score=1.0, config={"a": 1})
    return folder


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])


# Orbax's event loop is closed while its readers still report the truncated files.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_any_damaged_file_of_the_newest_is_found_or_harmless(saved, tmp_path, how):
    names = [
        path.relative_to(saved) for path in (saved / "2").rglob("*") if path.is_file()
    ]
    found = {}
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        damage(folder / name, how)
        restored = artifacts.restore_latest(folder, tree(0))
        digest = artifacts.tree_digest(restored.tree)
        assert digest == artifacts.tree_digest(tree(restored.step)), name
        assert (restored.step == 1) == (2 in restored.damaged)
        found[str(name)] = restored.step == 1
        shutil.rmtree(folder)
    # The arrays and their description are among what is noticed, not only luck.
    assert found["2/meta/metadata"]
    assert any(hit for name, hit in found.items() if "/d/" in name)


def test_a_changed_score_or_shape_is_damage_not_another_best(saved, tmp_path):
    for number, (old, new) in enumerate(
        [('"score": 1.0', '"score": 9.0'), ("float32[40, 40]", "float32[40, 41]")]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        file = folder / "2" / "meta" / "metadata"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        assert artifacts.best_step(folder) == 1
        restored = artifacts.restore_latest(folder, tree(0))
        assert restored.step == 1
        assert "digest does not match" in restored.damaged[2]


def test_older_descriptions_without_a_digest_are_read(saved, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(saved, folder)
    file = folder / "2" / "meta" / "metadata"
    meta = artifacts.read_json(file)
    del meta["check"]
    artifacts.write_json(file, meta)
    assert artifacts.restore_latest(folder, tree(0)).step == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_best_and_newest_never_evict_each_other(tmp_path, keep):
    scores = [3.0, 1.0, 5.0, 2.0, 0.0, 5.0, 1.0]
    for step, score in enumerate(scores, start=1):
        artifacts.save(tmp_path, step, {"x": np.float32(step)}, score=score, keep=keep)
        left = artifacts.steps(tmp_path)
        best = max(range(1, step + 1), key=lambda s: (scores[s - 1], s))
        assert set(left) == {best, *range(max(step - keep, 0) + 1, step + 1)}
        assert artifacts.best_step(tmp_path) == best


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """Pickles in the place of every file of a checkpoint."""
    import pickle

    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (marker,)

    artifacts.save(tmp_path / "c", 1, tree(1))
    for path in (tmp_path / "c").rglob("*"):
        if path.is_file():
            path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="every checkpoint"):
        artifacts.restore_latest(tmp_path / "c", tree(0))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert marker.exists()  # it would have
