"""Checkpoints: folders as Hugging Face's, read and written without torch.

A folder holds ``config.json``, ``model.safetensors`` or shards of it with an index, and
perhaps a tokenizer. Every tensor that the config asks for must be there in its shape, and
every tensor that is there must be asked for: a name that is off by a letter would
otherwise leave random or stale weights in a model that still talks.
"""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import LanguageModel, Params
from emfuse_jax.llm._files import read_object, write_object
from emfuse_jax.llm.config import Dtype, LmConfig, config_from_hf, config_to_hf
from emfuse_jax.llm.model import init_params, language_model
from emfuse_jax.llm.tensors import read_tensors, write_tensors
from emfuse_jax.llm.tokenizer import Tokenizer, find_tokenizer

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOP_NAMES = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkvo"},
    **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}
# Tables of older files that the config determines.
_DERIVED = "rotary_emb.inv_freq"


class LoadedLm(NamedTuple):
    """A checkpoint.

    Attributes:
        model: the functions; one object for all checkpoints of one architecture.
        params: its parameters.
        config: its architecture.
        tokenizer: None where the folder has none.
        stop_ids: tokens that end a text, of the generation config, the config and the
            tokenizer.
    """

    model: LanguageModel
    params: Params
    config: LmConfig
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]


class _Slot(NamedTuple):
    """Where a tensor of a file goes: its place in the tree and its shape in the file."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    transposed: bool


def load_language_model(
    folder: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    ignore: Collection[str] = (),
) -> LoadedLm:
    """Reads a Hugging Face folder.

    Args:
        folder: with ``config.json`` and safetensors.
        dtype: to convert the weights to; None is what the config names (float32 if it
            names none).
        ignore: keys of the config that you know not to change the logits.

    Raises:
        FileNotFoundError: if the folder, the config, the weights or a shard is missing.
        ValueError: for anything in them that is not understood or does not fit together.
            Texts name the file and the key or tensor.

    Example:
        >>> import tempfile
        >>> from emfuse_jax.llm import ByteTokenizer, LmConfig, init_params
        >>> folder = tempfile.mkdtemp()  # or one that transformers has written
        >>> config = LmConfig(vocab_size=257, hidden_size=8, num_layers=1, num_heads=1)
        >>> params = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
        >>> params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
        >>> save_pretrained(folder, params, config, ByteTokenizer())
        >>> loaded = load_language_model(folder)
        >>> loaded.model.vocab_size, loaded.tokenizer.encode("Hi")
        (257, [72, 105])
    """
    folder = _existing(folder)
    path = folder / "config.json"
    data = read_object(path)
    try:
        config = config_from_hf(data, ignore=ignore)
        if dtype is not None:
            config = dataclasses.replace(config, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    params = load_params(folder, config)
    tokenizer = find_tokenizer(folder)
    stops = _stop_ids(folder, data, tokenizer)
    return LoadedLm(language_model(config), params, config, tokenizer, stops)


def load_params(folder: str | os.PathLike[str], config: LmConfig) -> Params:
    """The parameters of a folder, in ``config.dtype``.

    One tensor at a time is in memory twice.

    Raises:
        FileNotFoundError: if the weights or a shard of them are missing.
        ValueError: if a tensor is missing, unused, or of another shape than the config's.

    Example:
        >>> import tempfile
        >>> from emfuse_jax.llm import LmConfig, init_params
        >>> folder = tempfile.mkdtemp()
        >>> config = LmConfig(vocab_size=257, hidden_size=8, num_layers=1, num_heads=1)
        >>> params = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
        >>> params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
        >>> save_pretrained(folder, params, config)
        >>> load_params(folder, config)["embed"].shape
        (257, 8)
    """
    folder = _existing(folder)
    stored = _open(folder)
    if config.num_layers > len(stored):  # before anything is made for each of them
        raise ValueError(
            f"{folder}: the config asks for {config.num_layers} layers, but there are "
            f"{len(stored)} tensors in all; the config is of another model, or damaged"
        )
    slots = _slots(config)
    if config.tied:
        _drop_tied_head(folder, stored)
    _check_names(folder, slots, stored)
    layers: list[Params] = [{} for _ in range(config.num_layers)]
    params: dict[Any, Any] = {"layers": layers}
    for name, slot in slots.items():
        tensor = stored[name]
        if tensor.shape != slot.shape:
            raise ValueError(
                f"{folder}: tensor {name} has shape {tensor.shape}; the config asks for "
                f"{slot.shape}"
            )
        if tensor.dtype.kind in "iub":
            raise ValueError(
                f"{folder}: tensor {name} is {tensor.dtype}; quantised weights are not "
                "supported"
            )
        # A copy, laid out in the order of its new axes: the file may change or go away.
        source = tensor.T if slot.transposed else tensor
        array = np.array(source, jnp.dtype(config.dtype), order="C")
        place: Any = params
        for part in slot.path[:-1]:
            place = place[part]
        place[slot.path[-1]] = jnp.asarray(array)
    return params


def save_pretrained(
    folder: str | os.PathLike[str],
    params: Params,
    config: LmConfig,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a folder that `load_language_model` and transformers read.

    Args:
        folder: made if absent; files of the same names are replaced.
        params: of ``language_model(config)``.
        config: its architecture.
        tokenizer: saved beside them; its special tokens go into ``config.json``.

    Raises:
        ValueError: if the parameters are not of the config's shapes and dtype, or the
            tokenizer has more tokens than the model.

    Example:
        >>> import tempfile
        >>> from emfuse_jax.llm import ByteTokenizer, LmConfig, init_params
        >>> folder = tempfile.mkdtemp()
        >>> config = LmConfig(vocab_size=257, hidden_size=8, num_layers=1, num_heads=1)
        >>> params = jax.eval_shape(lambda key: init_params(key, config), jax.random.key(0))
        >>> params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
        >>> save_pretrained(folder, params, config, ByteTokenizer())
        >>> sorted(path.name for path in pathlib.Path(folder).iterdir())
        ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
    """
    slots = _slots(config)
    leaves = _check_params(params, config)
    data = config_to_hf(config)
    if tokenizer is not None:
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model vocab_size="
                f"{config.vocab_size}"
            )
        for key in ("bos", "eos", "pad"):
            data[f"{key}_token_id"] = getattr(tokenizer, f"{key}_id")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: leaves[slot.path].T if slot.transposed else leaves[slot.path]
        for name, slot in slots.items()
    }
    write_tensors(folder / _SINGLE, tensors)
    if tokenizer is not None:
        tokenizer.save(folder)
    write_object(folder / "config.json", data)  # last: without it, nothing is loaded


def _slots(config: LmConfig) -> dict[str, _Slot]:
    """Every tensor that a checkpoint of this architecture holds, by its name there."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    slots = {}
    for name, hf_name in _TOP_NAMES.items():
        if name in shapes:
            slots[hf_name] = _slot((name,), shapes[name].shape)
    for index, layer in enumerate(shapes["layers"]):
        for name, leaf in layer.items():
            hf_name = f"model.layers.{index}.{_LAYER_NAMES[name]}"
            slots[hf_name] = _slot(("layers", index, name), leaf.shape)
    return slots


def _slot(path: tuple[Any, ...], shape: tuple[int, ...]) -> _Slot:
    transposed = len(shape) == 2 and path != ("embed",)  # torch's kernels are [out, in]
    return _Slot(path, shape[::-1] if transposed else shape, transposed)


def _open(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every stored tensor by name, of one file or of all shards."""
    if (folder / _SINGLE).is_file():
        stored = read_tensors(folder / _SINGLE)
    elif (folder / _INDEX).is_file():
        stored = _open_shards(folder)
    else:
        raise FileNotFoundError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; pickled weights are not read: "
            "save the model with safe_serialization=True"
        )
    return {name: x for name, x in stored.items() if not name.endswith(_DERIVED)}


def _open_shards(folder: pathlib.Path) -> dict[str, np.ndarray]:
    index = folder / _INDEX
    names = read_object(index).get("weight_map")
    if not isinstance(names, Mapping) or not names:
        raise ValueError(f"{index} has no weight_map of tensor names to files")
    stored: dict[str, np.ndarray] = {}
    for shard in sorted({str(value) for value in names.values()}):
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(
                f"{index} names the shard {shard!r}; expected a file of the folder itself"
            )
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"{folder / shard} is missing, though {index} names it; download or save "
                "the model again"
            )
        found = read_tensors(folder / shard)
        listed = {name for name, place in names.items() if place == shard}
        if listed != set(found):
            name = min(listed ^ set(found))
            holder = "the index" if name in listed else "the file"
            raise ValueError(
                f"{folder / shard} and {index} disagree: only {holder} has tensor {name!r}"
            )
        stored |= found
    return stored


def _drop_tied_head(folder: pathlib.Path, stored: dict[str, np.ndarray]) -> None:
    """Some files hold the tied matrix twice, which is fine while it is one matrix."""
    head, embed = stored.pop(_TOP_NAMES["head"], None), stored.get(_TOP_NAMES["embed"])
    if head is None or embed is None:
        return
    if head.dtype != embed.dtype or not np.array_equal(head, embed):
        raise ValueError(
            f"{folder}: the config ties the output layer to the embedding, but "
            f"{_TOP_NAMES['head']} is stored and differs; set tie_word_embeddings to false"
        )


def _check_names(
    folder: pathlib.Path, slots: Mapping[str, Any], stored: Mapping[str, Any]
) -> None:
    missing = [name for name in slots if name not in stored]
    unused = [name for name in stored if name not in slots]
    if missing:
        raise ValueError(
            f"{folder} lacks {_list(missing)} that its config asks for"
            + (f"; it has {_list(unused)} instead" if unused else "")
        )
    if unused:
        raise ValueError(
            f"{folder} has {_list(unused)} that no part of the model reads; the config is "
            "of another model, or asks for less than the file holds"
        )


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{len(names)} tensors ({shown}{', …' if len(names) > 4 else ''})"


def _check_params(params: Params, config: LmConfig) -> dict[tuple[Any, ...], Any]:
    """The leaves by path, all of the shapes and the dtype that the config says."""
    expected = _by_path(jax.eval_shape(lambda: init_params(jax.random.key(0), config)))
    found = _by_path(params)
    for path in dict.fromkeys([*expected, *found]):
        sides = [
            f"{leaf.dtype}{list(leaf.shape)}" if leaf is not None else "absent"
            for leaf in (found.get(path), expected.get(path))
        ]
        if sides[0] != sides[1]:
            raise ValueError(
                f"parameter {'.'.join(map(str, path))} is {sides[0]}; the config asks for "
                f"{sides[1]}"
            )
    return found


def _by_path(tree: Params) -> dict[tuple[Any, ...], Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        tuple(getattr(part, "key", getattr(part, "idx", None)) for part in path): leaf
        for path, leaf in leaves
    }


def _stop_ids(
    folder: pathlib.Path, data: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    found = [data.get("eos_token_id"), getattr(tokenizer, "eos_id", None)]
    path = folder / "generation_config.json"
    if path.is_file():
        found.append(read_object(path).get("eos_token_id"))
    flat = [
        x for value in found for x in (value if isinstance(value, list) else [value])
    ]
    return tuple(sorted({x for x in flat if type(x) is int}))


def _existing(folder: str | os.PathLike[str]) -> pathlib.Path:
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} is not a folder; expected one with config.json"
        )
    return path
