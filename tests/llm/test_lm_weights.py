"""Folders of checkpoints: what is written is read, and nothing is missing or left over."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from _lm_models import TINY, families, random_params
from emfuse_jax.llm import (
    ByteTokenizer,
    fuse_language_models,
    generate,
    language_model,
    load_language_model,
    load_params,
    pad_left,
    save_pretrained,
    uniform,
)
from emfuse_jax.llm.tensors import read_tensors, write_tensors

CONFIGS = {
    name: dataclasses.replace(TINY, **parts) for name, parts in families().items()
}
UP = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def saved(tmp_path):
    """A folder of the untied Llama, and functions that change what is in it."""
    config = CONFIGS["llama"]
    save_pretrained(tmp_path, random_params(config), config)
    path = tmp_path / "model.safetensors"

    def edit(**changes):
        tensors = {name: np.array(x) for name, x in read_tensors(path).items()}
        for name, tensor in changes.items():
            tensors[name] = tensor
            if tensor is None:
                del tensors[name]
        write_tensors(path, tensors)

    return tmp_path, edit


def shard(folder):
    """Splits the one file of a folder in two, with an index."""
    tensors = {
        k: np.array(v) for k, v in read_tensors(folder / "model.safetensors").items()
    }
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        write_tensors(folder / part, {name: tensors[name] for name in held})
    (folder / "model.safetensors").unlink()
    index = {name: part for part, held in parts.items() for name in held}
    write_index(folder, index)
    return index


def write_index(folder, index):
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_written_is_read(tmp_path, family):
    config, params = CONFIGS[family], random_params(CONFIGS[family])
    save_pretrained(tmp_path, params, config)
    loaded = load_language_model(tmp_path)
    assert loaded.config == config
    assert loaded.model is language_model(config)
    assert (loaded.tokenizer, loaded.stop_ids) == (None, ())
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    kernel = read_tensors(tmp_path / "model.safetensors")[UP]
    assert kernel.shape == (48, 32)  # torch's [out, in]
    np.testing.assert_array_equal(kernel.T, params["layers"][1]["up"])
    shard(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, config), params)


def test_dtypes_are_converted_on_request(tmp_path):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    save_pretrained(tmp_path, random_params(config), config)
    stored = read_tensors(tmp_path / "model.safetensors")
    assert {tensor.dtype.name for tensor in stored.values()} == {"bfloat16"}
    loaded = load_language_model(tmp_path, dtype="float32")
    assert loaded.config == TINY
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {"float32"}
    up = random_params(config)["layers"][0]["up"].astype(jnp.float32)
    np.testing.assert_array_equal(loaded.params["layers"][0]["up"], up)


def test_params_outlive_the_file(saved):
    folder, _ = saved
    params = load_params(folder, CONFIGS["llama"])
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    jax.tree.map(np.testing.assert_array_equal, params, random_params(CONFIGS["llama"]))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_params(folder, CONFIGS["llama"])


def test_stop_tokens_come_from_every_file(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=257)
    save_pretrained(tmp_path, random_params(config), config, ByteTokenizer())
    assert load_language_model(tmp_path).stop_ids == (256,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 10]}')
    assert load_language_model(tmp_path).stop_ids == (3, 10, 256)
    with pytest.raises(ValueError, match="257 tokens, the model vocab_size=67"):
        save_pretrained(tmp_path, random_params(TINY), TINY, ByteTokenizer())


def test_older_files_tables_are_passed_over(saved):
    folder, edit = saved
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(**{table: np.ones(4, np.float32)})
    assert table in read_tensors(folder / "model.safetensors")
    params = load_language_model(folder).params
    jax.tree.map(np.testing.assert_array_equal, params, random_params(CONFIGS["llama"]))


def test_missing_unused_and_misshapen_tensors_are_refused(saved):
    folder, edit = saved
    up = np.zeros((48, 32), np.float32)
    for changes, text in [
        ({UP: None}, rf"lacks 1 tensors \({UP}\)"),
        ({UP: None, UP + "s": up}, rf"lacks 1 .*; it has 1 tensors \({UP}s\) instead"),
        ({UP: up, UP + "s": None, "x.bias": up}, r"has 1 tensors \(x.bias\) that no"),
        ({"x.bias": None, UP: up.T}, rf"{UP} has shape \(32, 48\); .* \(48, 32\)"),
        ({UP: up.astype(np.int8)}, f"{UP} is int8; quantised"),
    ]:
        edit(**changes)
        with pytest.raises(ValueError, match=text) as caught:
            load_language_model(folder)
        assert str(folder) in str(caught.value)


def test_a_number_of_layers_that_no_file_holds_is_refused_at_once(saved):
    """Nothing is made for each of them: there is no memory for so many."""
    folder, _ = saved
    path = folder / "config.json"
    data = json.loads(path.read_text()) | {"num_hidden_layers": 10**12}
    path.write_text(json.dumps(data))
    text = "asks for 1000000000000 layers, but there are 29 tensors"
    with pytest.raises(ValueError, match=text) as caught:
        load_language_model(folder)
    assert str(folder) in str(caught.value)


def test_neither_torch_nor_transformers_is_needed(saved, monkeypatch):
    """Modules that are None cannot be imported; the linter sees to imports at the top."""
    for name in (
        "torch",
        "transformers",
        "safetensors",
        "tokenizers",
        "huggingface_hub",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    folder, _ = saved
    ByteTokenizer().save(folder)
    loaded = load_language_model(folder)
    save_pretrained(folder / "again", loaded.params, loaded.config)
    again = load_language_model(folder / "again")
    assert again.model is loaded.model
    fused = fuse_language_models([loaded.model] * 2, uniform())
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("abc")) == "abc"
    tokens, valid = pad_left([[1, 2, 3]])

    def write(params):
        key = jax.random.key(0)
        return generate(params, key, fused, tokens, valid, 2, temperature=0.0).tokens

    assert jax.jit(write)((loaded.params, again.params)).shape == (1, 2)


def test_a_tied_head_may_be_stored_if_it_is_the_same(tmp_path):
    config = CONFIGS["qwen2"]
    save_pretrained(tmp_path, random_params(config), config)
    path = tmp_path / "model.safetensors"
    tensors = {name: np.array(x) for name, x in read_tensors(path).items()}
    write_tensors(path, tensors | {HEAD: tensors[EMBED]})
    assert "head" not in load_language_model(tmp_path).params
    write_tensors(path, tensors | {HEAD: tensors[EMBED] + 1})
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        load_language_model(tmp_path)


def test_shards_must_be_whole(saved):
    folder, _ = saved
    config = CONFIGS["llama"]
    index = shard(folder)
    first = index[EMBED]
    for change, text in [
        ({EMBED: "../elsewhere.safetensors"}, "expected a file of the folder itself"),
        ({EMBED: "/etc/passwd"}, "expected a file of the folder itself"),
        ({"model.extra": first}, "only the index has tensor 'model.extra'"),
    ]:
        write_index(folder, index | change)
        with pytest.raises(ValueError, match=text):
            load_params(folder, config)
    write_index(folder, {k: v for k, v in index.items() if k != EMBED})
    with pytest.raises(ValueError, match="only the file has tensor"):
        load_params(folder, config)
    write_index(folder, index)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors is missing"):
        load_params(folder, config)
    write_index(folder, {})
    with pytest.raises(ValueError, match="no weight_map"):
        load_params(folder, config)


def test_missing_files_are_named(saved):
    folder, _ = saved
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load_language_model(folder / "nowhere")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        load_language_model(folder)
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type='mamba'"):
        load_language_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_language_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_language_model(folder)


def test_params_of_another_architecture_are_not_saved(tmp_path):
    config = CONFIGS["llama"]
    params = random_params(config)
    with pytest.raises(ValueError, match=r"layers\.0\.\w_bias is float32.*; .* absent"):
        save_pretrained(tmp_path, params, TINY)
    with pytest.raises(ValueError, match=r"layers\.0\.\w+ is absent; .* float32"):
        save_pretrained(tmp_path, random_params(TINY), config)
    other = dataclasses.replace(config, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        save_pretrained(tmp_path, params, other)
    assert list(tmp_path.iterdir()) == []
