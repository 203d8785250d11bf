"""The merge command on tiny dynamics models and language models, and its refusals."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _tiny_runs as tiny
from emfuse_jax import artifacts
from emfuse_jax.base import SpaceSpec
from emfuse_jax.data.d4rl_reader import read_d4rl, write_d4rl
from emfuse_jax.data.tokens import pack_documents
from emfuse_jax.dynamics import AdetmConfig, FusionConfig, fit_scales
from emfuse_jax.llm import LmConfig, RopeConfig, init_params
from emfuse_jax.llm.tokenizer import ByteTokenizer
from emfuse_jax.llm.weights import load_language_model, save_pretrained
from emfuse_jax.merging import model_soup
from experiments import merge
from experiments._flags import _leaves, parse
from experiments._lm_experts import expand_runs
from experiments._measure import data_behind
from experiments._merge_lm import cut_windows

ADETM = AdetmConfig(
    num_lags=2,
    energy_sizes=(8,),
    head_sizes=(8,),
    state_features=8,
    action_features=8,
    num_heads=2,
    batch_size=16,
    energy_rows=8,
)
LM = LmConfig(
    vocab_size=257,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    intermediate_size=16,
    context_length=32,
    rope=RopeConfig(theta=100.0),
    tied=True,
)


@pytest.fixture(scope="module", autouse=True)
def _keeps_nothing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMFUSE_JAX_CACHE", "0")
        yield


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a merge that must be refused, leaving ``tmp_path`` as it is."""

    def run(*flags):
        before = tiny.snapshot(tmp_path)
        status = merge.main(["merge", f"--run_dir={tmp_path}/merged", *map(str, flags)])
        error = " ".join(capsys.readouterr().err.split())
        assert status == 2, error
        assert "error: " in error  # after the progress, where there was some
        assert tiny.snapshot(tmp_path) == before
        assert not (tmp_path / "merged").exists()
        return error

    return run


def write_expert(path, data, *, key, config=ADETM, scale=1.0):
    """A run directory of train_dynamics whose model has not learned anything."""
    dataset = read_d4rl(data)
    spec = SpaceSpec(dataset.observation.shape[1], dataset.action.shape[1])
    description = artifacts.describe("adetm", config, spec)
    learner = artifacts.build(description)
    scales = fit_scales(dataset, 2)
    rng = np.random.default_rng(key)
    state = jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype),
        jax.eval_shape(learner.init, jax.random.key(0), scales),
    )
    head = jax.tree.map(lambda leaf: scale * leaf, state.params.head)
    state = state._replace(params=state.params._replace(head=head, scales=scales))
    artifacts_of_run = {"kind": "train_dynamics", "config": {"data": [str(data)]}}
    path.mkdir()
    artifacts.write_json(path / "config.json", artifacts_of_run)
    artifacts.write_description(path, description)
    artifacts.save(path / "checkpoints", 1, state)
    return path


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two data sets and an expert on each; ``bad`` predicts far too much. Do not write."""
    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate("ab"):
        data = tiny.write_data(
            root / f"{name}.hdf5", seed=seed, observation=5, action=2
        )
        write_expert(root / name, data, key=seed)
    write_expert(root / "bad", root / "a.hdf5", key=7, scale=30.0)
    return root


def command(root, names, *flags):
    experts = ",".join(f"{root}/{name}" for name in names)
    return merge.main(["merge", f"--experts={experts}", *map(str, flags)])


def assert_trees_equal(first, second, **tolerance):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 0}))


def test_help_and_flags(capsys):
    assert merge.main(["merge", "--help"]) == 0
    assert "greedy_soup: the mean of those" in " ".join(capsys.readouterr().out.split())
    assert [
        leaf.name for leaf in _leaves(merge.MergeConfig, None, "") if not leaf.help
    ] == []
    config = parse(merge.MergeConfig, ["merge", "--weights=0.3,0.7"]).config
    assert config.weights == (0.3, 0.7)


def test_a_soup_of_dynamics_models_is_a_run_of_one(experts, tmp_path, capsys):
    run = tmp_path / "soup"
    flags = (f"--run_dir={run}", "--weights=0.25,0.75")
    assert command(experts, "ab", *flags) == 0
    merged = artifacts.load_run(run)
    singles = [artifacts.load_run(experts / name) for name in "ab"]
    expected = model_soup([single.params for single in singles], [0.25, 0.75])
    assert_trees_equal(merged.params, expected, rtol=1e-6)
    assert merged.model.expert.num_lags == 2
    assert set(data_behind([str(run)])) == {f"{experts}/{name}.hdf5" for name in "ab"}
    result = artifacts.read_json(run / "merge.json")
    assert result["weights"] == [0.25, 0.75]
    assert len(result["domains"]) == len(result["merged"]) == 2
    assert all(len(row) == 2 for row in result["experts"].values())
    assert result["experts"][f"{experts}/a"] != result["merged"]
    assert {"provenance.json", "stages.json"} <= {p.name for p in run.iterdir()}
    assert "merged: " in capsys.readouterr().out
    # A finished run is read and not made again; with other flags it is not taken over.
    before = tiny.digests(run / "checkpoints"), (run / "merge.json").stat().st_mtime_ns
    assert command(experts, "ab", *flags) == 0
    after = tiny.digests(run / "checkpoints"), (run / "merge.json").stat().st_mtime_ns
    assert before == after
    assert command(experts, "ab", f"--run_dir={run}") == 2
    assert "weights" in capsys.readouterr().err
    # One that was killed before it had measured is finished.
    (run / "merge.json").unlink()
    assert command(experts, "ab", *flags) == 0
    assert artifacts.read_json(run / "merge.json") == result


def test_regmean_of_dynamics_models(experts, tmp_path, capsys):
    flags = ("--method=regmean", "--shrinkage=0.2", f"--run_dir={tmp_path}/regmean")
    assert command(experts, "ab", *flags) == 0
    told = capsys.readouterr().out
    # The memory is stated first, the errors last.
    assert told.index("MB of Grams at a time") < told.index("merged: ")
    merged = artifacts.load_run(tmp_path / "regmean").params
    singles = [artifacts.load_run(experts / name).params for name in "ab"]
    soup = model_soup(singles)
    assert_trees_equal(merged.scales, soup.scales, rtol=1e-6)
    kernels = [
        tree.energy["params"]["condition_layer"]["kernel"] for tree in (merged, soup)
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    result = artifacts.read_json(tmp_path / "regmean" / "merge.json")
    assert all(np.isfinite(result["merged"]))
    assert result["memory"]["widest"] == 16  # the condition: eight and eight features
    assert list(result["rows"].values()) == [2 * 152] * 2


def test_regmean_with_too_few_rows(experts, refused):
    pair = f"--experts={experts}/a,{experts}/b"
    error = refused(pair, "--method=regmean", "--num_samples=3")
    assert "6 rows to measure its widest layer on, which reads 16 inputs" in error
    assert "--num_samples=3" in error
    assert "--ridge=1e-4" in error


def test_singular_grams_leave_nothing_behind(experts, refused, tmp_path):
    """An input that is always 0 is seen only once the Grams are there."""
    arrays = tiny.arrays(observation=5, action=2)
    arrays["actions"][:, 1] = 0.0
    write_d4rl(tmp_path / "lame.hdf5", arrays)
    data = f"--data={tmp_path}/lame.hdf5,{tmp_path}/lame.hdf5"
    names = f"--experts={experts}/a,{experts}/b"
    # Scaled as in the experts' own data, the column is constant: one direction is lost.
    error = refused(names, "--method=regmean", "--shrinkage=0", data)
    assert "the Grams of" in error
    assert "ridge, such as 1e-4" in error


def test_greedy_soup_keeps_the_bad_one_out(experts, tmp_path):
    names = ("bad", "a", "b")
    flags = ("--method=greedy_soup", f"--run_dir={tmp_path}/greedy")
    assert command(experts, names, *flags) == 0
    result = artifacts.read_json(tmp_path / "greedy" / "merge.json")
    assert f"{experts}/bad" not in result["members"]
    scores = result["validation"]
    assert scores["merged"] <= min(scores[f"{experts}/{name}"] for name in names)
    members = [artifacts.load_run(path).params for path in result["members"]]
    merged = artifacts.load_run(tmp_path / "greedy").params
    assert_trees_equal(merged, model_soup(members), rtol=1e-6)


def test_what_cannot_be_merged(experts, refused, tmp_path):
    pair = f"--experts={experts}/a,{experts}/b"
    assert "--experts is required" in refused()
    error = refused(f"--experts={experts}/a,{experts}/a")
    assert "names a model twice" in error
    error = refused(f"--experts={experts}/a,{tmp_path}")
    assert "has no model.json" in error
    error = refused(f"--experts={tmp_path}")
    assert "neither model.json" in error
    assert "nor config.json" in error
    assert "greedy_soup" in refused(pair, "--method=greedy_soup", "--weights=0.5,0.5")
    assert "sum to 1.1" in refused(pair, "--weights=0.5,0.6")
    assert "each of the 2 experts" in refused(pair, "--weights=1")
    assert "shrinkage=2.0" in refused(pair, "--shrinkage=2")
    assert "for language models" in refused(pair, f"--validation={tmp_path}")
    assert "1 data sets for 2 experts" in refused(pair, f"--data={experts}/a.hdf5")
    assert "no file" in refused(pair, f"--data={experts}/a.hdf5,{experts}/c.hdf5")
    wide = AdetmConfig(**{**vars(ADETM), "head_sizes": (9,)})
    write_expert(tmp_path / "wide", experts / "a.hdf5", key=0, config=wide)
    error = refused(f"--experts={experts}/a,{tmp_path}/wide")
    assert f"leaf head.params.fc0.bias is [9] in {tmp_path}/wide, [8] in" in error
    other = AdetmConfig(**{**vars(ADETM), "anchor": "current"})
    write_expert(tmp_path / "other", experts / "a.hdf5", key=0, config=other)
    error = refused(f"--experts={experts}/a,{tmp_path}/other")
    assert "config.anchor: 'backtrack' ≠ 'current'" in error
    description = artifacts.load_run(experts / "a").description
    shutil.copytree(experts / "a", tmp_path / "fused")
    fusion = artifacts.describe_fusion([description], FusionConfig())
    artifacts.write_description(tmp_path / "fused", fusion)
    params = artifacts.join_params(
        [description], [artifacts.load_run(experts / "a").params]
    )
    shutil.rmtree(tmp_path / "fused" / "checkpoints")
    artifacts.save(tmp_path / "fused" / "checkpoints", 0, params)
    assert "such as the fusion's members" in refused(f"--experts={tmp_path}/fused")


TEXTS = {
    "law": "The party shall pay the sum. " * 40,
    "code": "for i in range(9): f(i)\n" * 40,
}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """Two untrained language models with their texts; do not write here."""
    pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("language")
    (root / "text").mkdir()
    init = jax.jit(lambda key: init_params(key, LM))
    for seed, (name, text) in enumerate(TEXTS.items()):
        params = init(jax.random.key(seed))
        save_pretrained(root / "models" / f"expert-{name}", params, LM, ByteTokenizer())
        (root / f"{name}.txt").write_text(text)
    packed = {n: pack_documents([list(t.encode())], 256) for n, t in TEXTS.items()}
    np.savez(root / "text" / "tokens.npz", **packed)
    models = {"models": {"base": {}, "expert-law": {}, "expert-code": {}}}
    artifacts.write_json(root / "result.json", models)
    return root


def test_regmean_of_language_models(language, tmp_path, capsys):
    run = tmp_path / "regmean"
    validation = f"--validation={language}/law.txt,{language}/code.txt"
    flags = ("--method=regmean", "--window=24", f"--run_dir={run}", validation)
    # A run of train_lm_experts stands for its experts and knows their text.
    assert merge.main(["merge", f"--experts={language}", *flags]) == 0
    told = capsys.readouterr().out
    assert told.index("hidden states") < told.index("merged: ")
    # The run is an expert for other commands.
    (folder,) = expand_runs([str(run)])
    merged = load_language_model(folder)
    assert merged.config == LM
    assert merged.tokenizer.encode("ab") == [97, 98]
    singles = [
        load_language_model(language / "models" / f"expert-{name}").params
        for name in TEXTS
    ]
    soup = model_soup(singles)
    np.testing.assert_allclose(merged.params["embed"], soup["embed"], rtol=1e-6)
    down = [tree["layers"][1]["down"] for tree in (merged.params, soup)]
    assert np.abs(down[0] - down[1]).max() > 1e-3
    result = artifacts.read_json(run / "merge.json")
    assert list(result["rows"].values()) == [len(t) + 2 for t in TEXTS.values()]
    assert result["memory"]["largest"] == 4 * (3 * (8 * 8 + 1) + 16 * 16 + 1)
    assert result["unit"] == "nats per token"
    # Nothing was learned: every model is about as good as guessing among 257.
    assert np.allclose(result["merged"], np.log(257), atol=0.3)
    # Given as files, the same text gives the same model.
    paths = ",".join(f"{language}/models/expert-{name}" for name in TEXTS)
    data = ",".join(f"{language}/{name}.txt" for name in TEXTS)
    again = ("--method=regmean", "--window=24", f"--run_dir={tmp_path}/again")
    assert merge.main(["merge", f"--experts={paths}", f"--data={data}", *again]) == 0
    assert artifacts.read_json(tmp_path / "again" / "merge.json")["merged"] == []
    other = load_language_model(tmp_path / "again" / "model").params
    assert_trees_equal(other, merged.params, rtol=1e-6)


def test_greedy_soup_of_language_models(language, tmp_path):
    flags = ("--method=greedy_soup", f"--run_dir={tmp_path}/greedy", "--window=24")
    validation = f"--validation={language}/law.txt"
    assert merge.main(["merge", f"--experts={language}", validation, *flags]) == 0
    result = artifacts.read_json(tmp_path / "greedy" / "merge.json")
    errors = [value for name, value in result["validation"].items() if name != "merged"]
    assert result["validation"]["merged"] <= min(errors)


def test_language_models_that_cannot_be_merged(language, refused, tmp_path):
    pair = f"--experts={language}"
    assert "give --validation" in refused(pair, "--method=greedy_soup", "--window=24")
    error = refused(pair, "--method=regmean", "--window=8", "--num_samples=8")
    assert "has 8 rows to measure its widest layer on, which reads 16 inputs" in error
    assert "1 … 32" in refused(pair, "--window=64")
    assert "not used by --method=soup" in refused(pair, "--window=8", "--data=x,y")
    regmean = ("--method=regmean", "--window=8")
    assert "names 1 texts for 2 experts" in refused(pair, *regmean, "--data=x")
    (tmp_path / "latin.txt").write_bytes("Müller".encode("latin-1") * 50)
    (tmp_path / "empty.txt").write_text("")
    texts = f"--data={language}/law.txt,{tmp_path}/"
    assert "UTF-8" in refused(pair, *regmean, texts + "latin.txt")
    assert "holds no text" in refused(pair, *regmean, texts + "empty.txt")
    assert "no files" in refused(pair, *regmean, texts + "none.txt")
    first = language / "models" / "expert-law"
    shutil.copytree(first, tmp_path / "alone")
    error = refused(f"--experts={tmp_path}/alone", *regmean)
    assert "not in a run of train_lm_experts" in error

    class Shifted(ByteTokenizer):
        def vocab(self):
            return [*super().vocab()[1:], "x"]

    params = load_language_model(first).params
    save_pretrained(tmp_path / "shifted", params, LM, Shifted())
    error = refused(f"--experts={first},{tmp_path}/shifted", "--window=8")
    assert "the vocabulary of expert 1 differs" in error
    assert "by energy instead" in error
    wide = LmConfig(**{**vars(LM), "intermediate_size": 24})
    save_pretrained(
        tmp_path / "wide", init_params(jax.random.key(0), wide), wide, ByteTokenizer()
    )
    error = refused(f"--experts={first},{tmp_path}/wide", "--window=8")
    assert (
        f"leaf layers.0.down is [24, 8] in {tmp_path}/wide, [16, 8] in {first}" in error
    )
    far = LmConfig(**{**vars(LM), "rope": RopeConfig(theta=50.0)})
    save_pretrained(tmp_path / "far", params, far, ByteTokenizer())
    error = refused(f"--experts={first},{tmp_path}/far", "--window=8")
    assert "rope.theta: 100.0 ≠ 50.0" in error


@pytest.mark.parametrize(
    ("length", "limit"), [(5, 100), (24, 100), (100, 1000), (1000, 60)]
)
def test_windows_of_a_stream(length, limit):
    stream = np.arange(1, length + 1)
    found = cut_windows(stream, 8, limit)
    assert found.tokens.shape == found.valid.shape
    assert found.tokens.shape[1:] == (16, 8)
    kept = found.tokens[found.valid]
    if length <= limit:
        np.testing.assert_array_equal(kept, stream)
    else:
        assert limit <= len(kept) < limit + 8
        assert len(set(kept.tolist())) == len(kept)
        assert kept[0] == 1
        assert kept[-1] == length
    assert jnp.all(found.tokens[~found.valid] == 0)
