import errno
import os
import subprocess
import sys
import textwrap
import warnings

import h5py
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from benchmarks._mutations import damage_json
from emfuse_jax.data import minari_reader
from emfuse_jax.data.d4rl_reader import (
    dataset_arrays,
    read_arrays,
    read_attributes,
    read_d4rl,
    write_d4rl,
)
from emfuse_jax.data.dataset import make_dataset
from emfuse_jax.data.load import load_dataset
from emfuse_jax.data.minari_reader import local_datasets, read_minari, write_minari


def arrays(lengths=(4, 3, 5)):
    """Two terminal episodes and one that times out; observations count the rows."""
    rows = sum(lengths)
    ends = np.cumsum(lengths) - 1
    step = np.arange(rows, dtype=np.float32) * 10
    terminals, timeouts = np.zeros(rows, bool), np.zeros(rows, bool)
    terminals[ends[:-1]], timeouts[ends[-1]] = True, True
    following = step + 10
    following[ends] += 1  # so that a next observation taken across a reset is seen
    return {
        "observations": np.stack([step, -step], axis=1),
        "actions": np.random.default_rng(0)
        .uniform(-1, 1, (rows, 2))
        .astype(np.float32),
        "rewards": np.sqrt(step),
        "next_observations": np.stack([following, -following], axis=1),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def write_raw(path, given):
    with h5py.File(path, "w") as file:
        for key, value in given.items():
            file[key] = value


def assert_equal(first, second):
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)


def test_hdf5_round_trip_with_attributes(tmp_path):
    path = tmp_path / "deeper" / "hopper.hdf5"
    qpos = np.random.default_rng(0).standard_normal((12, 6))
    write_d4rl(path, {**arrays(), "qpos": qpos}, attributes={"policy": "x", "seed": 3})
    data = read_d4rl(path)
    assert_equal(data, make_dataset(**arrays()))
    np.testing.assert_array_equal(read_arrays(path)["qpos"], qpos)
    assert read_attributes(path) == {"policy": "x", "seed": 3}
    assert [p.name for p in path.parent.iterdir()] == ["hopper.hdf5"]
    assert_equal(data, make_dataset(**dataset_arrays(data)))


def test_what_lies_in_the_heap_of_hdf5_is_not_read(tmp_path):
    path, given = tmp_path / "x.hdf5", arrays()
    with h5py.File(path, "w") as file:
        for key, value in given.items():
            file[key] = value
        file["note"] = "this text"
    data = path.read_bytes()
    # The first object of the heap without a size: libhdf5 would never come to its end.
    heap = data.index(b"GCOL") + 16
    assert data[heap + 16 :].startswith(b"this text")
    path.write_bytes(data[: heap + 8] + b"\0" * 8 + data[heap + 16 :])
    assert_equal(read_d4rl(path), make_dataset(**given))
    with h5py.File(path, "w") as file:
        file["actions"] = ["a", "b"]
        file.attrs["how"] = "of any length"
    with pytest.raises(ValueError, match="'actions' holds no numbers"):
        read_d4rl(path)
    with pytest.raises(OSError, match="'how' has no fixed length"):
        read_attributes(path)


def test_hdf5_as_published_with_groups_and_other_dtypes(tmp_path):
    given = arrays()
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        for key, value in given.items():
            file[key] = value.astype(np.float64 if value.dtype != bool else np.uint8)
        file["infos/qpos"] = np.zeros((12, 3))
        file["metadata/algorithm"] = "SAC"
    assert_equal(read_d4rl(tmp_path / "d4rl.hdf5"), make_dataset(**given))


def test_next_observations_are_derived_within_episodes(tmp_path):
    given = arrays()
    del given["next_observations"]
    write_raw(tmp_path / "d4rl.hdf5", given)
    data = read_d4rl(tmp_path / "d4rl.hdf5")
    # The last step of each of the three episodes is left out.
    assert data.observation[:, 0].tolist() == [0, 10, 20, 40, 50, 70, 80, 90, 100]
    step = np.array([[10, -10]])
    np.testing.assert_array_equal(data.next_observation, data.observation + step)
    assert data.age.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert not data.terminated.any()
    assert np.flatnonzero(data.truncated).tolist() == [2, 4, 8]


def test_broken_hdf5_is_refused_by_name(tmp_path):
    path = tmp_path / "d4rl.hdf5"
    with pytest.raises(FileNotFoundError, match=r"d4rl.hdf5.*collect_data"):
        read_d4rl(path)
    write_d4rl(path, arrays())
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"d4rl.hdf5: not a whole HDF5 file"):
            read_d4rl(path)
    path.write_text("not data")
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        read_d4rl(path)
    for key in ("rewards", "timeouts"):
        given = arrays()
        del given[key]
        write_raw(path, given)
        with pytest.raises(ValueError, match=rf"d4rl.hdf5: {key} absent"):
            read_d4rl(path)
    write_raw(path, {**arrays(), "actions": arrays()["actions"] * 2})
    with pytest.raises(ValueError, match=r"d4rl.hdf5: .* outside \[-1, 1\]"):
        read_d4rl(path)


def test_writing_never_touches_existing_files_by_accident(tmp_path):
    path = tmp_path / "d4rl.hdf5"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite"):
        write_d4rl(path, arrays())
    with pytest.raises(ValueError, match="rewards"):
        write_d4rl(path, {**arrays(), "rewards": np.full(12, np.nan)}, overwrite=True)
    with pytest.raises(TypeError):
        write_d4rl(path, {**arrays(), "bad": np.array([object()])}, overwrite=True)
    assert path.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["d4rl.hdf5"]
    write_d4rl(path, arrays(), overwrite=True)
    assert len(read_d4rl(path).reward) == 12


# A limit on the size of files: writes fail as on a full disk.
FULL = """
    import resource, sys
    import numpy as np
    from emfuse_jax.data.d4rl_reader import read_arrays, write_d4rl

    arrays = dict(np.load(sys.argv[2]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        write_d4rl(sys.argv[1], arrays, overwrite=True)
    except OSError as error:
        print(error.errno, error.filename)
"""


def test_a_full_disk_leaves_the_older_file_and_a_process_that_can_say_so(tmp_path):
    path = tmp_path / "a.hdf5"
    write_d4rl(path, arrays())
    whole = path.read_bytes()
    noise = np.random.default_rng(0).standard_normal((12, 100))
    np.savez(tmp_path / "arrays.npz", **arrays(), noise=noise)
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(FULL),
        path,
        tmp_path / "arrays.npz",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{errno.EFBIG} {path}\n"
    assert done.stderr == ""
    assert path.read_bytes() == whole
    assert {p.name for p in tmp_path.iterdir()} == {"a.hdf5", "arrays.npz"}


def test_minari_data_for_which_there_is_no_room(tmp_path, minari_data, monkeypatch):
    usage = minari_reader.shutil.disk_usage(tmp_path)._replace(free=20_000)
    with monkeypatch.context() as patch:
        patch.setattr(minari_reader.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(
            OSError, match=r"needed and 20000 are free.*test-v0"
        ) as caught:
            write_minari(minari_data, "test-v0", root=tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def minari_data():
    """Minari stores an episode's observations once, so these are sequences."""
    given = arrays()
    return make_dataset(**given)


def test_minari_round_trip(tmp_path, minari_data, monkeypatch):
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = write_minari(
            minari_data, "mine/hopper/test-v0", root=tmp_path, reference=(0.0, 10.0)
        )
    assert folder == tmp_path / "mine" / "hopper" / "test-v0"
    assert "MINARI_DATASETS_PATH" not in os.environ
    assert_equal(read_minari("mine/hopper/test-v0", root=tmp_path), minari_data)
    assert local_datasets(tmp_path) == ["mine/hopper/test-v0"]
    assert not list(tmp_path.glob(".partial-*"))
    with pytest.raises(FileExistsError, match="overwrite"):
        write_minari(minari_data, "mine/hopper/test-v0", root=tmp_path)
    with pytest.raises(ValueError, match="has no version; write mine/hopper/test-v0"):
        write_minari(minari_data, "mine/hopper/test", root=tmp_path)
    with pytest.raises(ValueError, match="is no Minari id"):
        write_minari(minari_data, "mine hopper-v0", root=tmp_path)


def test_minari_refuses_rows_that_are_no_sequence(tmp_path, minari_data):
    broken = minari_data._replace(next_observation=minari_data.next_observation + 1)
    with pytest.raises(ValueError, match="row 0: next_observation is not"):
        write_minari(broken, "mine/hopper/broken-v0", root=tmp_path)
    assert local_datasets(tmp_path) == []


def test_minari_overwrites_when_asked_and_keeps_the_old_one_when_it_fails(
    tmp_path, minari_data, monkeypatch
):
    import minari

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_minari(minari_data, "test-v0", root=tmp_path)
        changed = minari_data._replace(reward=minari_data.reward + 1)
        with monkeypatch.context() as patch:
            patch.setattr(minari, "create_dataset_from_buffers", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                write_minari(changed, "test-v0", root=tmp_path, overwrite=True)
        assert_equal(read_minari("test-v0", root=tmp_path), minari_data)
        write_minari(changed, "test-v0", root=tmp_path, overwrite=True)
    assert_equal(read_minari("test-v0", root=tmp_path), changed)


def test_minari_without_a_network_names_the_fix(tmp_path, monkeypatch):
    for name in minari_reader._NETWORK_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(minari_reader.socket, "create_connection", refuse)
    with pytest.raises(
        FileNotFoundError,
        match=r"hopper/medium-v0.*unreachable.*Local data sets: none.*pip install",
    ):
        read_minari("mujoco/hopper/medium-v0", root=tmp_path)


def test_a_damaged_minari_copy_is_refused(tmp_path, minari_data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = write_minari(minari_data, "test-v0", root=tmp_path)
    file = next(folder.rglob("*.hdf5"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="test-v0: the local copy"):
        read_minari("test-v0", root=tmp_path)


@pytest.fixture
def minari_folder(tmp_path, minari_data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_minari(minari_data, "test-v0", root=tmp_path) / "data"


def test_minari_episodes_whose_arrays_do_not_fit_are_named(tmp_path, minari_folder):
    for name, keep, words in (
        ("rewards", slice(0, 2), r"episode 1 has 3 actions.*rewards \(2,\)"),
        ("truncations", slice(0, 0), r"truncations \(0,\)"),
        ("observations", slice(0, 3), "3 actions, 3 observations"),
        ("actions", (slice(0, 3), 0), r"actions are ndarray\(3,\)"),
    ):
        with h5py.File(minari_folder / "main_data.hdf5", "r+") as file:
            group = file["episode_1"]
            whole = group[name][()]
            del group[name]
            group[name] = whole[keep]
        with pytest.raises(ValueError, match=f"test-v0: .*{words}"):
            read_minari("test-v0", root=tmp_path)
        with h5py.File(minari_folder / "main_data.hdf5", "r+") as file:
            del file["episode_1"][name]
            file["episode_1"][name] = whole
    assert len(read_minari("test-v0", root=tmp_path).reward) == 12


def test_minari_files_that_lead_elsewhere_or_claim_too_much_are_refused(
    tmp_path, minari_folder
):
    path, other = minari_folder / "main_data.hdf5", tmp_path / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["secret"] = np.zeros((5, 2), np.float32)
    whole = path.read_bytes()
    link = h5py.ExternalLink(str(other), "secret")

    def replaced(make):
        def change(group):
            del group["observations"]
            make(group)

        return change

    huge = {"shape": (2**40, 2), "dtype": "f4", "chunks": (1024, 2)}
    for words, change in (
        ("is a link", replaced(lambda g: g.__setitem__("observations", link))),
        ("claim", replaced(lambda g: g.create_dataset("observations", **huge))),
        ("in the file twice", lambda g: g.__setitem__("again", g)),
    ):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            change(file["episode_0"])
        with pytest.raises(ValueError, match=f"test-v0: .*{words}"):
            read_minari("test-v0", root=tmp_path)


def test_damaged_descriptions_of_minari_data_are_read_or_refused(
    tmp_path, minari_folder
):
    path, refused = minari_folder / "metadata.json", []
    whole = path.read_bytes()

    @hypothesis.given(st.integers(0, 2**32))
    def check(seed):
        path.write_bytes(damage_json(np.random.default_rng(seed), whole))
        try:
            assert len(read_minari("test-v0", root=tmp_path).reward) <= 12
        except ValueError as error:
            refused.append(str(error))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
    assert len(refused) > 5
    assert all(text.startswith("test-v0: ") for text in refused)
    path.write_text(
        whole.decode().replace('"total_episodes": 3', '"total_episodes": 9')
    )
    with pytest.raises(ValueError, match=r"tells of 9 episodes, main_data\.hdf5 has 3"):
        read_minari("test-v0", root=tmp_path)


def test_load_dataset_guesses_the_format(tmp_path, minari_data):
    write_d4rl(tmp_path / "a.hdf5", dataset_arrays(minari_data))
    assert_equal(load_dataset(tmp_path / "a.hdf5"), minari_data)
    assert_equal(load_dataset("a.hdf5", root=tmp_path), minari_data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_minari(minari_data, "mine/a-v0", root=tmp_path)
    assert_equal(load_dataset("mine/a-v0", root=tmp_path), minari_data)
    with pytest.raises(ValueError, match="format='csv'; expected one of d4rl, minari"):
        load_dataset("a", format="csv")
    with pytest.raises(ValueError, match="window of 6"):
        load_dataset(tmp_path / "a.hdf5", min_length=6)
