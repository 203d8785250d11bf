"""What the reader soak reads: for each reader whole files, how to damage them, a call.

``read`` is the public function that a user's file goes through. What it may raise is
`REFUSALS`; anything else is a mistake of ours.
"""

import functools
import io
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _mutations as mutations

REFUSALS = (ValueError, OSError)


class Reader(NamedTuple):
    """One reader.

    Attributes:
        wholes: files that are read without complaint, made once.
        damage: ``(rng, data) -> data``.
        read: ``(path) -> anything``; the file has the name ``name``.
        name: of the file.
    """

    wholes: Callable[[], list[bytes]]
    damage: Callable[[np.random.Generator, bytes], bytes]
    read: Callable[[pathlib.Path], Any]
    name: str


def make_input(reader: Reader, wholes: list[bytes], seed: int, index: int) -> bytes:
    """The input of a number."""
    rng = np.random.default_rng([seed, index])
    return reader.damage(rng, wholes[int(rng.integers(0, len(wholes)))])


def _saved(write: Callable[[pathlib.Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "file"
        write(path)
        return path.read_bytes()


def _steps(rows: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ends = np.arange(1, rows + 1) % 4 == 0
    return {
        "observations": rng.standard_normal((rows, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": rng.standard_normal(rows).astype(np.float32),
        "next_observations": rng.standard_normal((rows, 3)).astype(np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": ends,
    }


def _hdf5_wholes() -> list[bytes]:
    import h5py

    from emfuse_jax.data.d4rl_reader import write_d4rl

    made = {"how": "{}", "seed": 1}

    def plain(path: pathlib.Path, **options: Any) -> None:
        with h5py.File(path, "w", **options) as file:
            for key, value in _steps().items():
                file[key] = value
            file["infos/qpos"] = np.zeros((12, 2))
            file["note"] = "text"

    return [
        _saved(lambda path: write_d4rl(path, _steps(), attributes=made)),
        _saved(plain),
        _saved(functools.partial(plain, libver="latest")),
    ]


def _npz_wholes() -> list[bytes]:
    from emfuse_jax.data.behaviour import LAYERS

    sizes = {"fc0": (4, 3), "fc1": (4, 4), "last_fc": (2, 4), "last_fc_log_std": (2, 4)}
    arrays = {}
    for layer in LAYERS:
        arrays[f"{layer}.weight"] = np.ones(sizes[layer], np.float32)
        arrays[f"{layer}.bias"] = np.ones(sizes[layer][0], np.float32)
    wholes = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, **arrays)
        wholes.append(file.getvalue())
    return wholes


def _safetensors_wholes() -> list[bytes]:
    from emfuse_jax.llm.tensors import write_tensors

    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.c": np.arange(4, dtype=np.int16),
        "scalar": np.array(7, np.int64),
        "none": np.zeros((0, 4), np.float16),
    }
    return [_saved(lambda path: write_tensors(path, tensors))]


def _read_tensors(path: pathlib.Path) -> Any:
    from emfuse_jax.llm.tensors import read_tensors

    return {name: np.array(x).sum() for name, x in read_tensors(path).items()}


def _hf_wholes() -> list[bytes]:
    from emfuse_jax.llm.config import LmConfig, config_to_hf
    from emfuse_jax.llm.rope import RopeConfig

    size = {"vocab_size": 257, "hidden_size": 64, "num_layers": 2, "num_heads": 4}
    llama3 = RopeConfig(
        kind="llama3",
        factor=8.0,
        original_length=1024,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
    )
    yarn = RopeConfig(kind="yarn", factor=4.0, original_length=1024)
    configs = [
        LmConfig(**size),
        LmConfig(**size, rope=llama3, tied=True, dtype="bfloat16"),
        LmConfig(**size, family="qwen2", qkv_bias=True, rope=yarn),
        LmConfig(**size, family="qwen3"),
    ]
    return [json.dumps(config_to_hf(config)).encode() for config in configs]


def _read_hf(path: pathlib.Path) -> Any:
    from emfuse_jax.llm._files import read_object
    from emfuse_jax.llm.config import config_from_hf

    return config_from_hf(read_object(path))


def _tokenizer_wholes() -> list[bytes]:
    import tokenizers

    from emfuse_jax.llm import ByteTokenizer

    with tempfile.TemporaryDirectory() as folder:
        ByteTokenizer().save(folder)
        plain = (pathlib.Path(folder) / "tokenizer.json").read_bytes()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated"
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<s>"], show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat 123"] * 3, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return [plain, made.to_str().encode()]


def _read_tokenizer(path: pathlib.Path) -> Any:
    from emfuse_jax.llm import load_tokenizer

    tokenizer = load_tokenizer(path.parent)
    ids = tokenizer.encode("The cat sat 12.5 é\n", special=True)
    return tokenizer.decode(ids), tokenizer.vocab()


def _template_wholes() -> list[bytes]:
    """Templates as ChatML and Llama 3 have them."""
    chatml = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    llama = (
        "{% set ns = namespace(n=0) %}{{ bos_token }}{% for m in messages -%}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% generation %}{{ ns.n ~ m | tojson }}"
        "{% endgeneration %}{% for _ in range(3) %}{{ '-' * 4 }}{% break %}{% endfor %}"
        "{% endfor %}"
    )
    return [chatml.encode(), llama.encode()]


def _read_template(path: pathlib.Path) -> Any:
    from emfuse_jax.llm._chat import render_chat

    said = [{"role": "user", "content": "The cat"}, {"role": "system", "content": "?"}]
    special = {"bos_token": "<s>"}
    text = path.read_text(encoding="utf-8")
    return render_chat(text, said, add_generation_prompt=True, special_tokens=special)


def _run_config_wholes() -> list[bytes]:
    from emfuse_jax.artifacts import to_json
    from experiments.train_dynamics import TrainDynamicsConfig
    from experiments.train_policy import TrainPolicyConfig

    configs = [TrainDynamicsConfig(data=("a.hdf5",)), TrainPolicyConfig()]
    return [json.dumps(to_json(config)).encode() for config in configs]


def _read_run_config(path: pathlib.Path) -> Any:
    from emfuse_jax.artifacts import load_config
    from experiments.train_dynamics import TrainDynamicsConfig
    from experiments.train_policy import TrainPolicyConfig

    kind = TrainPolicyConfig if b"eval_every" in path.read_bytes() else None
    return load_config(kind or TrainDynamicsConfig, path)


def _model_wholes() -> list[bytes]:
    from emfuse_jax import artifacts
    from emfuse_jax.base import SpaceSpec
    from emfuse_jax.dynamics import AdetmConfig, FusionConfig
    from emfuse_jax.policies.bc import BcConfig

    spec = SpaceSpec(3, 2)
    small = AdetmConfig(energy_sizes=(4,), head_sizes=(4,), num_lags=2)
    expert = artifacts.describe("adetm", small, spec)
    policy = artifacts.describe("bc", BcConfig(), spec, params_in="policy")
    fused = artifacts.describe_fusion([expert, expert], FusionConfig())
    return [json.dumps(d).encode() for d in (expert, policy, fused)]


def _read_model(path: pathlib.Path) -> Any:
    from emfuse_jax import artifacts
    from emfuse_jax.artifacts.descriptions import check_description

    description = artifacts.read_json(path)
    check_description(description)  # as `load_run` does
    return artifacts.build(description)


def _metrics_wholes() -> list[bytes]:
    rows = [{"step": i, "time": 1.5, "loss": 0.5, "seeds": [1, 2]} for i in range(4)]
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


def _read_metrics(path: pathlib.Path) -> Any:
    from emfuse_jax.artifacts import export_csv, read_metrics

    export_csv(path, os.fspath(path) + ".csv")
    return read_metrics(path)


def _read_hdf5(path: pathlib.Path) -> Any:
    from emfuse_jax.data.d4rl_reader import read_attributes, read_d4rl

    return read_d4rl(path), read_attributes(path)


def _read_npz(path: pathlib.Path) -> Any:
    from emfuse_jax.data.behaviour import load_behaviour

    return load_behaviour(path)


READERS = {
    "hdf5": Reader(_hdf5_wholes, mutations.damage_bytes, _read_hdf5, "x.hdf5"),
    "npz": Reader(_npz_wholes, mutations.damage_npz, _read_npz, "x.npz"),
    "safetensors": Reader(
        _safetensors_wholes,
        mutations.damage_safetensors,
        _read_tensors,
        "model.safetensors",
    ),
    "hf_config": Reader(_hf_wholes, mutations.damage_json, _read_hf, "config.json"),
    "tokenizer": Reader(
        _tokenizer_wholes, mutations.damage_json, _read_tokenizer, "tokenizer.json"
    ),
    "chat_template": Reader(
        _template_wholes, mutations.damage_bytes, _read_template, "chat_template.jinja"
    ),
    "run_config": Reader(
        _run_config_wholes, mutations.damage_json, _read_run_config, "config.json"
    ),
    "model": Reader(_model_wholes, mutations.damage_json, _read_model, "model.json"),
    "metrics": Reader(
        _metrics_wholes, mutations.damage_bytes, _read_metrics, "metrics.jsonl"
    ),
}
"""By name."""
