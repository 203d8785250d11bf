"""Files of earlier runs are read, or refused by an error that names them."""

import json
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import _tiny_lms as tiny
from benchmarks._mutations import damage_json, damage_npz
from experiments import _found, _lm, _lm_experts, _measure
from experiments.evaluate import _environment


@pytest.fixture
def text(tmp_path):
    """The ``text`` folder of a run of tiny language models."""
    return tiny.write_text(tmp_path / "text")


def made_run(folder, **config):
    folder.mkdir(exist_ok=True)
    written = {"kind": "train_dynamics", "config": config}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def assert_read_or_refused(path, damage, read, least):
    """Every damage of a file is harmless, or refused by a text that begins with a name."""
    whole, refused = path.read_bytes(), []
    read()

    @hypothesis.given(st.integers(0, 2**32))
    def check(seed):
        path.write_bytes(damage(np.random.default_rng(seed), whole))
        try:
            read()
        except (ValueError, OSError) as error:
            refused.append(str(error))

    check()
    assert len(refused) >= least
    named = [text for text in refused if str(path.parent) in text]
    assert len(named) == len(refused), set(refused) - set(named)


@pytest.mark.parametrize("name", ["corpus.json", "windows/py.jsonl", "tokens.npz"])
def test_prepared_text(text, name):
    damage = damage_npz if name.endswith("npz") else damage_json
    if name.endswith("jsonl"):

        def damage(rng, whole):
            lines = whole.split(b"\n")
            lines[0] = damage_json(rng, lines[0])
            return b"\n".join(lines)

    assert_read_or_refused(text / name, damage, lambda: _lm.read_prepared(text), 20)


def test_configs_of_runs(tmp_path):
    data = made_run(tmp_path / "run", env="hopper", data=["a.hdf5"], experts=[])
    for read in (_environment, lambda path: _measure.data_behind([path])):
        made_run(tmp_path / "run", env="hopper", data=["a.hdf5"], experts=[])
        assert_read_or_refused(
            data / "config.json", damage_json, lambda r=read: r(str(data)), 10
        )


def test_data_behind_runs_of_runs(tmp_path):
    first = made_run(tmp_path / "first", data=["a.hdf5", "b.hdf5"])
    second = made_run(tmp_path / "second", data=["b.hdf5", "c.hdf5"])
    fused = made_run(tmp_path / "fused", data=[], experts=[str(first), str(second)])
    runs = [str(second), str(fused)]
    assert _measure.data_behind(runs) == ("b.hdf5", "c.hdf5", "a.hdf5")
    made_run(fused, data=[], experts=[str(fused)])  # of itself
    assert _measure.data_behind([str(fused)]) == ()
    with pytest.raises(FileNotFoundError):
        _measure.data_behind([str(tmp_path / "none")])


@pytest.mark.parametrize("name", ["expert-/../../../other", "expert-a/b"])
def test_a_result_cannot_name_models_elsewhere(tmp_path, name):
    (tmp_path / "run" / "models").mkdir(parents=True)
    result = tmp_path / "run" / "result.json"
    result.write_text(json.dumps({"models": {"expert-a": {}, "base": {}}}))
    folder = tmp_path / "run" / "models" / "expert-a"
    assert _lm_experts.expand_runs([str(tmp_path / "run")]) == [folder]
    result.write_text(json.dumps({"models": {"expert-a": {}, name: {}}}))
    with pytest.raises(ValueError, match=r"result\.json .*is no folder of .*models"):
        _lm_experts.expand_runs([str(tmp_path / "run")])


def test_streams_that_unpack_to_too_much_or_are_no_tokens(tmp_path):
    path = tmp_path / "tokens.npz"
    np.savez_compressed(path, a=np.zeros(2**20, np.uint16))
    with pytest.raises(ValueError, match=r"tokens\.npz .*unpacks to"):
        _found.token_streams(path)
    for array in (np.zeros(3), np.zeros((2, 2), np.uint16), np.array([None], object)):
        np.savez(path, a=array)
        with pytest.raises(ValueError, match=r"tokens\.npz is damaged"):
            _found.token_streams(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"no array")
    with pytest.raises(ValueError, match=r"tokens\.npz is damaged"):
        _found.token_streams(path)
