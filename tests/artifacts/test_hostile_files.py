"""Files that are damaged or meant to harm are refused by errors of ours."""

import ast
import json
import pathlib
import pickle
import re

import h5py
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import emfuse_jax
from benchmarks import _readers as readers
from emfuse_jax import artifacts
from emfuse_jax.artifacts.descriptions import check_description
from emfuse_jax.data.behaviour import load_behaviour
from emfuse_jax.data.d4rl_reader import read_arrays, read_d4rl
from emfuse_jax.data.minari_reader import read_minari
from emfuse_jax.data.text import read_text
from emfuse_jax.llm import load_language_model, load_tokenizer
from emfuse_jax.llm.tensors import read_tensors
from experiments import _run
from experiments._found import run_config, token_streams
from experiments._lm import read_prepared, read_windows

PACKAGE = pathlib.Path(emfuse_jax.__file__).parent
# HDF5 and tokenizers run foreign C and Rust: the soak reads those in a process apart.
OURS = ("npz", "safetensors", "hf_config", "run_config", "model", "metrics")


@pytest.fixture(scope="module")
def wholes():
    return {name: readers.READERS[name].wholes() for name in OURS}


@pytest.mark.parametrize("name", OURS)
def test_damaged_files_are_read_or_refused(name, wholes, tmp_path):
    reader = readers.READERS[name]
    path = tmp_path / reader.name
    for whole in wholes[name]:
        path.write_bytes(whole)
        reader.read(path)
    refused = []

    @hypothesis.given(st.integers(0, 2**40))
    def check(index):
        path.write_bytes(readers.make_input(reader, wholes[name], 1, index))
        try:
            reader.read(path)
        except readers.REFUSALS as error:
            refused.append(str(error))

    check()
    assert len(refused) > 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@hypothesis.given(JSON)
def test_any_value_is_a_description_or_refused(value):
    with pytest.raises(ValueError, match=r".+"):
        check_description(value)


def test_every_part_of_a_description_is_missed(wholes):
    whole = json.loads(wholes["model"][1])
    for name in whole:
        part = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(ValueError, match=name if name != "kind" else "model"):
            artifacts.descriptions.check_description(part)


@pytest.mark.parametrize("place", ["/etc", "..", "../other", "a/b", "", 3])
def test_a_description_cannot_lead_out_of_its_directory(tmp_path, wholes, place):
    description = json.loads(wholes["model"][1]) | {"params_in": place}
    artifacts.write_json(tmp_path / "model.json", description)
    with pytest.raises(
        ValueError, match=r"model\.json: params_in=.*a folder of the run"
    ):
        artifacts.load_run(tmp_path)


@pytest.mark.parametrize("name", ["../x.json", "/tmp/x.json", "tasks/../../x.json"])
def test_results_stay_inside_of_the_run_directory(tmp_path, name):
    import _toy_main as toy_main

    config = toy_main.ToyConfig(run_dir="x")
    with _run.open_run(tmp_path / "run", config, kind="toy") as run:
        for write in (run.write_json, lambda n, v: run.once(n, lambda: v)):
            with pytest.raises(ValueError, match="is not inside of"):
                write(name, {})
        assert run.once("tasks/x.json", lambda: {"a": 1}) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def _read_run_files(folder):
    """By every reader there is; `test_damaged_checkpoint` has those of checkpoints."""
    for read in (
        lambda: read_minari("evil-v0", root=folder),
        lambda: token_streams(folder / "tokens.npz"),
        lambda: read_windows(folder / "windows.jsonl"),
        lambda: read_prepared(folder),
        lambda: run_config(folder),
        lambda: load_language_model(folder / "shards"),
        lambda: read_text(folder / "text.txt.gz"),
        lambda: artifacts.read_json(folder / "config.json"),
        lambda: artifacts.load_run(folder),
        lambda: artifacts.read_metrics(folder / "metrics.jsonl"),
        lambda: load_tokenizer(folder),
        lambda: load_language_model(folder),
        lambda: read_tensors(folder / "model.safetensors"),
        lambda: load_behaviour(folder / "x.npz"),
        lambda: read_d4rl(folder / "x.hdf5"),
    ):
        with pytest.raises((ValueError, OSError)):
            read()


def _write_shards(folder, data):
    """A whole config and index beside a pickled shard."""
    folder.mkdir()
    (folder / "config.json").write_bytes(readers.READERS["hf_config"].wholes()[0])
    shard = "pytorch_model.bin"
    index = {"weight_map": {"model.norm.weight": shard}}
    artifacts.write_json(folder / "model.safetensors.index.json", index)
    (folder / shard).write_bytes(data)


def test_pickles_are_refused_in_the_place_of_every_file(tmp_path):
    marker = tmp_path / "ran"
    data = pickle.dumps(Evil(marker))
    names = ("config.json", "model.json", "metrics.jsonl", "tokenizer.json", "x.npz")
    names += ("model.safetensors", "x.hdf5", "pytorch_model.bin", "tokens.npz")
    names += ("windows.jsonl", "corpus.json", "text.txt.gz")
    names += ("evil-v0/data/main_data.hdf5", "evil-v0/data/metadata.json")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data + b"\n")
    _write_shards(tmp_path / "shards", data)
    _read_run_files(tmp_path)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()  # it would have


def test_pickles_inside_of_whole_files_are_refused(tmp_path):
    marker = tmp_path / "ran"
    array = np.array([Evil(marker)], object)
    np.savez(tmp_path / "x.npz", **{"fc0.weight": array})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_behaviour(tmp_path / "x.npz")
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["observations"] = np.void(pickle.dumps(Evil(marker)))
    with pytest.raises(ValueError, match=r"x\.hdf5"):
        read_d4rl(tmp_path / "x.hdf5")
    assert not marker.exists()
    np.load(tmp_path / "x.npz", allow_pickle=True)["fc0.weight"]
    assert marker.exists()


UNPICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "pandas"}
LOADS = {"np.load", "numpy.load", "torch.load"}


def unpickling(source):
    """Lines of a program that could unpickle what it reads."""
    found = []
    if not re.search(r"\bload\(|" + "|".join(UNPICKLES), source):
        return found
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if UNPICKLES & {name.split(".")[0] for name in names}:
            found.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in LOADS:
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if options.get("allow_pickle") != "False":
                found.append(node.lineno)
    return found


def test_nothing_unpickles():
    """Neither the package nor the command lines, nor the benchmarks."""
    folders = [PACKAGE, *(pathlib.Path(m.__file__).parent for m in (_run, readers))]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(files) > 200
    found = {str(path): unpickling(path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import numpy as np\nnp.load(path)", [2]),
        ("np.load(path, allow_pickle=True)", [1]),
        ("np.load(path, allow_pickle=False)", []),
        ("def f():\n    from pickle import loads", [2]),
        ("import torch\ntorch.load(path)", [2]),
        ("json.load(file)\nagent.load(params)", []),
    ],
)
def test_what_could_unpickle_is_seen(source, found):
    assert unpickling(source) == found


def test_hdf5_that_leads_elsewhere_or_claims_too_much_is_refused(tmp_path):
    path, other = tmp_path / "x.hdf5", tmp_path / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["secret"] = np.arange(4.0)
    (tmp_path / "secret.bin").write_bytes(b"\0" * 32)
    layout = h5py.VirtualLayout(shape=(4,), dtype="f8")
    layout[:] = h5py.VirtualSource(str(other), "secret", shape=(4,))

    def external(file):
        files = [(str(tmp_path / "secret.bin"), 0, 32)]
        file.create_dataset("a", (4,), "f8", external=files)

    cases = {
        "is a link": [
            lambda file: file.__setitem__("a", h5py.ExternalLink(str(other), "secret")),
            lambda file: file.__setitem__("a", h5py.SoftLink("/nowhere")),
        ],
        "lie in other files": [
            lambda file: file.create_virtual_dataset("a", layout),
            external,
        ],
        "claim": [
            lambda file: file.create_dataset("a", (2**40,), "f8", chunks=(1024,)),
            lambda file: file.create_dataset("a", (2**20, 2**20), "f4", chunks=True),
        ],
    }
    for words, makers in cases.items():
        for make in makers:
            with h5py.File(path, "w") as file:
                make(file)
            with pytest.raises(ValueError, match=words):
                read_arrays(path)


def test_an_npz_that_unpacks_to_too_much_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **{"fc0.weight": np.zeros(2**27, np.uint16)})
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match="it unpacks to 268435584 bytes"):
        load_behaviour(path)
