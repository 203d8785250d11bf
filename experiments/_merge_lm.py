"""Language models as experts of a merge: their text, their layers, their losses."""

import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.base import Params
from emfuse_jax.data.text import find_files, read_text
from emfuse_jax.data.text_sources import TextSource
from emfuse_jax.data.tokens import pack_documents
from emfuse_jax.llm import LINEAR_INPUTS, LmConfig, apply_layer, embed_tokens
from emfuse_jax.llm.train import next_token_loss
from emfuse_jax.llm.vocabulary import check_same_vocabulary
from emfuse_jax.llm.weights import LoadedLm, load_language_model, save_pretrained
from emfuse_jax.merging import (
    Stage,
    check_same_architecture,
    gram_memory,
    regmean_streamed,
)
from experiments._found import token_streams
from experiments._lm_experts import expand_runs
from experiments._merging import GramPlan, Mergeable
from experiments._run import Run

MODEL_FOLDER = "model"
"""Of a run: the merged model as Hugging Face's transformers reads it."""
_BATCH = 16
"""Windows per pass."""


class Tokens(NamedTuple):
    """Windows of text, padded on the right: leaves ``[batch, row, time]``."""

    tokens: np.ndarray
    valid: np.ndarray

    def batches(self) -> list[tuple[jax.Array, jax.Array]]:
        """As device arrays ``[row, time]``."""
        return [(jnp.asarray(t), jnp.asarray(v)) for t, v in zip(*self, strict=True)]


def open_language(
    paths: Sequence[str],
    data: Sequence[str],
    validation: Sequence[str],
    *,
    with_grams: bool,
    num_samples: int,
    window: int,
) -> Mergeable:
    """Folders of language models.

    Args:
        paths: folders in Hugging Face's layout, of one architecture and vocabulary; a run
            of train_lm_experts stands for its experts.
        data: text of each expert's domain, for RegMean; none is what train_lm_experts
            trained each on.
        validation: text to choose and to measure by; each is a column.
        with_grams: whether RegMean is to be planned.
        num_samples: tokens per expert, and per validation text, at most.
        window: tokens that are read together.

    Raises:
        FileNotFoundError: if a folder or a text is not there.
        ValueError: if the models cannot be merged, or a text is not UTF-8 or empty.
    """
    folders = expand_runs(paths)
    names = tuple(map(str, folders))
    loaded = [load_language_model(folder) for folder in folders]
    _check(loaded, names)
    config = loaded[0].config
    if not 1 <= window <= config.context_length:
        raise ValueError(
            f"--window={window} is not within 1 … {config.context_length}, the models' "
            "context length"
        )
    params = [expert.params for expert in loaded]
    read = functools.partial(_read, loaded[0].tokenizer, window, num_samples)
    texts = {path: read(path) for path in validation}

    @jax.jit
    def losses(params: Params, tokens: jax.Array, valid: jax.Array) -> Any:
        loss = next_token_loss(config, params, tokens, valid)
        return jnp.sum(loss), jnp.sum(valid[:, 1:] & valid[:, :-1])

    def measure(params: Params) -> list[float]:
        rows = []
        for text in texts.values():
            sums = [losses(params, *batch) for batch in text.batches()]
            rows.append(float(sum(s for s, _ in sums) / sum(n for _, n in sums)))
        return rows

    plan = None
    if with_grams:
        plan = _plan(
            config, params, _training_text(folders, data, read, window, num_samples)
        )
    return Mergeable(
        names=names,
        params=params,
        family="language",
        unit="nats per token",
        domains=tuple(validation),
        measure=measure,
        validate=measure,
        plan=plan,
        save=lambda run, params: _save(run, params, loaded[0], folders[0]),
    )


def _check(loaded: Sequence[LoadedLm], names: Sequence[str]) -> None:
    check_same_architecture([expert.params for expert in loaded], names)
    vocabularies = []
    for expert, name in zip(loaded, names, strict=True):
        pair = [_settings(loaded[0].config), _settings(expert.config)]
        if pair[0] != pair[1]:
            changed = artifacts.differences(pair[0], pair[1])
            raise ValueError(
                f"{name} is not of the architecture of {names[0]} "
                f"({'; '.join(changed[:5])}); only models of one can be merged"
            )
        if expert.tokenizer is None:
            raise ValueError(
                f"{name} has no tokenizer, so that it cannot be seen whether token ids "
                "mean the same to all experts; save it with its tokenizer.json"
            )
        vocabularies.append(expert.tokenizer.vocab())
    try:
        check_same_vocabulary(vocabularies)
    except ValueError as error:
        listed = "; ".join(f"expert {i}: {name}" for i, name in enumerate(names))
        raise ValueError(
            f"{str(error).split(';')[0]} ({listed}). Rows of the embeddings would be "
            "averaged that are of different tokens: fuse these experts by energy instead"
        ) from error


def _settings(config: LmConfig) -> Any:
    return artifacts.to_json(config)


def _read(tokenizer: Any, window: int, num_samples: int, path: str) -> Tokens:
    """Windows of a file, a folder or a glob of UTF-8 text; of a ``.jsonl`` file the
    ``text`` of each line."""
    documents, count = [], 0
    for _, file in find_files(TextSource(name=path, patterns=(path,))):
        for text in _documents(file):
            documents.append(tokenizer.encode(text))
            count += len(documents[-1])
        if count >= num_samples:
            break
    if not count:
        raise ValueError(f"{path} holds no text; give files that are not empty")
    separator = next(
        (i for i in (tokenizer.eos_id, tokenizer.bos_id) if i is not None), 0
    )
    return cut_windows(pack_documents(documents, separator), window, num_samples)


def _documents(file: pathlib.Path) -> list[str]:
    if file.suffix != ".jsonl":
        return [read_text(file)]
    try:
        return [
            json.loads(line)["text"] for line in read_text(file).split("\n") if line
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file}: {error!r}; expected an object with a text in every line"
        ) from error


def _training_text(
    folders: Sequence[pathlib.Path],
    data: Sequence[str],
    read: Callable[[str], Tokens],
    window: int,
    num_samples: int,
) -> list[Tokens]:
    """Each expert's domain."""
    if data:
        if len(data) != len(folders):
            raise ValueError(
                f"--data names {len(data)} texts for {len(folders)} experts; give one for "
                "each, in their order"
            )
        return [read(path) for path in data]
    found = []
    for folder in folders:
        domain = folder.absolute().name.removeprefix("expert-")
        path = folder.absolute().parents[1] / "text" / "tokens.npz"
        if folder.absolute().parent.name != "models" or not path.exists():
            raise ValueError(
                f"{folder} is not in a run of train_lm_experts, so that its text is not "
                "known; give --data, a file or folder of its domain for each expert"
            )
        streams = token_streams(path)
        if domain not in streams:
            raise ValueError(
                f"{path} has no domain {domain!r} (it has {', '.join(streams)}); give "
                "--data, a file or folder of its domain for each expert"
            )
        found.append(cut_windows(streams[domain], window, num_samples))
    return found


def cut_windows(stream: Any, window: int, num_tokens: int) -> Tokens:
    """Evenly spaced windows of a stream, about ``num_tokens`` tokens, in whole batches.

    A stream that is shorter is read whole. What fills up the last window and the last
    batch is not valid.
    """
    stream = np.asarray(stream, np.int32)
    count = -(-min(len(stream), num_tokens) // window)
    starts = np.arange(count) * window
    if len(stream) > count * window:
        starts = np.linspace(0, len(stream) - window, count).astype(int)
    rows = -(-count // _BATCH) * _BATCH
    index = np.full((rows, window), len(stream))
    index[:count] = starts[:, None] + np.arange(window)
    valid = index < len(stream)
    tokens = np.where(valid, stream[np.minimum(index, len(stream) - 1)], 0)
    shape = (-1, _BATCH, window)
    return Tokens(tokens.reshape(shape), valid.reshape(shape))


def lm_stages(config: LmConfig) -> list[Stage]:
    """The layers as stages: they read ``(hidden, valid)``, as `embed` gives it.

    An output layer of its own is no stage: like the embedding, it is merged by the mean.
    """

    @jax.jit
    def apply(params: Params, carry: Any) -> tuple[Any, dict[str, Any]]:
        hidden, valid = carry
        hidden, inputs = apply_layer(config, params, hidden, valid)
        return (hidden, valid), {name: (x, valid) for name, x in inputs.items()}

    return [
        Stage(("layers", index), apply, LINEAR_INPUTS)
        for index in range(config.num_layers)
    ]


def embed(params: Params, batches: Sequence[Any]) -> list[Any]:
    """What the first stage reads."""
    return [(embed_tokens(params, tokens), valid) for tokens, valid in batches]


def _plan(config: LmConfig, params: list[Params], texts: list[Tokens]) -> GramPlan:
    stages = lm_stages(config)
    batches = [text.batches() for text in texts]
    longest = max(range(len(texts)), key=lambda index: len(batches[index]))
    shapes = jax.eval_shape(lambda p: embed(p, batches[longest]), params[longest])
    memory = gram_memory(stages, params[longest], shapes)

    def merge(on_step: Callable[[int], Any], **options: Any) -> Params:
        carries = [embed(p, own) for p, own in zip(params, batches, strict=True)]
        return regmean_streamed(params, stages, carries, on_stage=on_step, **options)

    counts = tuple(int(text.valid.sum()) for text in texts)
    return GramPlan(memory, counts, len(stages), merge)


def _save(run: Run, params: Params, first: LoadedLm, folder: pathlib.Path) -> None:
    """The model's folder is there whole or not at all."""
    path = run.path / MODEL_FOLDER
    unfinished = path.with_name(f".{MODEL_FOLDER}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)
    save_pretrained(unfinished, params, first.config, first.tokenizer)
    generation = folder / "generation_config.json"  # it may name more stop tokens
    if generation.is_file():
        shutil.copyfile(generation, unfinished / generation.name)
    unfinished.rename(path)
