"""The language models of a command line: opened, checked against each other, fused."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from emfuse_jax import tree
from emfuse_jax.artifacts.config import read_json
from emfuse_jax.base import LanguageModel
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.rules import FusionRule
from emfuse_jax.llm.vocabulary import (
    VocabularyMap,
    align_vocabularies,
    check_same_vocabulary,
)
from experiments import _found, _names


class Experts(NamedTuple):
    """Language models that can be fused, in the order in which they were named.

    ``tokenizer`` is the first one's, and its tokens are the fusion's; ``stop_ids`` end a
    text. ``vocabulary`` maps each model's tokens onto them, None where all are the same;
    ``temperatures`` are None where all are 1.
    """

    names: tuple[str, ...]
    models: tuple[LanguageModel, ...]
    configs: tuple[Any, ...]
    params: tuple[Any, ...]
    tokenizer: Any
    stop_ids: tuple[int, ...]
    temperatures: tuple[float, ...] | None
    vocabulary: tuple[VocabularyMap, ...] | None

    @property
    def stacked(self) -> bool:
        """Whether all have one architecture, so that they run as one batched step."""
        return all(config == self.configs[0] for config in self.configs)

    @property
    def vocab_size(self) -> int:
        """Of the fusion."""
        mapped = self.vocabulary
        return mapped[0].reference_size if mapped else self.models[0].vocab_size


def open_experts(
    paths: Sequence[str],
    *,
    temperatures: Sequence[float] = (),
    map_vocabulary: bool = False,
    min_exact: float = 0.9,
    dtype: Any = None,
    ignore: Sequence[str] = (),
) -> Experts:
    """Loads models from folders of Hugging Face's layout.

    Args:
        paths: such folders; a run directory of train_lm_experts stands for its experts.
        temperatures: one per expert; none is 1 for all.
        map_vocabulary: whether vocabularies may differ.
        min_exact: see `map_vocabulary`.
        dtype: see `load_language_model`.
        ignore: see there.

    Raises:
        FileNotFoundError: if a folder or one of its files is missing.
        ValueError: if a folder is named twice or has no tokenizer, a checkpoint is refused,
            or vocabularies differ and may not, or differ too much.
    """
    from emfuse_jax.llm.weights import load_language_model

    folders = expand_runs(paths)
    options = {"dtype": dtype, "ignore": ignore}
    loaded = [load_language_model(folder, **options) for folder in folders]
    for folder, entry in zip(folders, loaded, strict=True):
        if entry.tokenizer is None:
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json; copy the tokenizer that the model was "
                "trained with into the folder"
            )
    models = tuple(entry.model for entry in loaded)
    vocabulary = _vocabulary(
        [entry.tokenizer for entry in loaded],
        models,
        _called(folders),
        map_vocabulary,
        min_exact,
    )
    # Ids of other vocabularies mean nothing in the first one's.
    same = vocabulary is None or all(mapping.identity for mapping in vocabulary)
    stops = {i for entry in (loaded if same else loaded[:1]) for i in entry.stop_ids}
    return Experts(
        names=_called(folders),
        models=models,
        configs=tuple(entry.config for entry in loaded),
        params=tuple(entry.params for entry in loaded),
        tokenizer=loaded[0].tokenizer,
        stop_ids=tuple(sorted(stops)),
        temperatures=tuple(temperatures) or None,
        vocabulary=vocabulary,
    )


def expand_runs(paths: Sequence[str]) -> list[pathlib.Path]:
    """Folders of models: a run of train_lm_experts becomes those of its experts, one of
    merge that of its model.

    Raises:
        FileNotFoundError: if a folder does not exist, or a run is not finished.
        ValueError: if a folder is named twice, or a run's result names one elsewhere.
    """
    folders: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        with _names.run(path):
            if not path.is_dir():
                raise FileNotFoundError(
                    f"expert {path} is no folder; give folders that hold config.json, "
                    "*.safetensors and a tokenizer, or a run of train_lm_experts or merge"
                )
        if not (path / "models").is_dir():
            merged = path / "model"
            folders.append(merged if (merged / "config.json").is_file() else path)
            continue
        if not (path / "result.json").exists():
            raise FileNotFoundError(f"{path} is not finished; run its command again")
        with _found.reading(path / "result.json"):
            models = list(read_json(path / "result.json")["models"])
            experts = [name for name in models if name.startswith("expert-")]
            folders += _found.folders_in(path / "models", experts)
    if len(set(folders)) < len(folders):
        named = ", ".join(map(str, folders))
        raise ValueError(f"--experts names a model twice ({named}); give each once")
    return folders


def select_experts(experts: Experts, chosen: slice) -> Experts:
    """Some of the models; tokenizer and vocabulary stay those of all."""
    cut = {
        field: None if value is None else value[chosen]
        for field, value in experts._asdict().items()
        if field not in ("tokenizer", "stop_ids")
    }
    return experts._replace(**cut)


def fuse_rule(experts: Experts, rule: FusionRule) -> LanguageModel:
    """The fusion under one rule; its params are `join_params`.

    Raises:
        ValueError: as `fuse_language_models`.
    """
    stacked = experts.stacked
    return fuse_language_models(
        experts.models[0] if stacked else experts.models,
        rule,
        num_models=len(experts.models) if stacked else None,
        temperatures=experts.temperatures,
        vocabulary=experts.vocabulary,
    )


def join_params(experts: Experts) -> Any:
    """The experts' parameters as their fusion takes them, whatever its rule."""
    return tree.stack(experts.params) if experts.stacked else experts.params


def _called(folders: Sequence[pathlib.Path]) -> tuple[str, ...]:
    names = tuple(folder.absolute().name for folder in folders)
    return names if len(set(names)) == len(names) else tuple(map(str, folders))


def _vocabulary(
    tokenizers: Sequence[Any],
    models: Sequence[LanguageModel],
    names: Sequence[str],
    map_vocabulary: bool,
    min_exact: float,
) -> tuple[VocabularyMap, ...] | None:
    """None where token ids mean the same to all, and no embedding is padded."""
    strings = [list(tokenizer.vocab()) for tokenizer in tokenizers]
    if not map_vocabulary:
        try:
            check_same_vocabulary(strings)
        except ValueError as error:
            named = "; ".join(f"expert {i}: {name}" for i, name in enumerate(names))
            what = str(error).split(";")[0]
            raise ValueError(
                f"{what} ({named}). Fuse experts of one tokenizer, or give "
                "--map_vocabulary to map them onto that of the first"
            ) from error
    same = all(own == strings[0] for own in strings)
    if same and all(model.vocab_size == len(strings[0]) for model in models):
        return None
    return align_vocabularies(strings, min_exact=min_exact)
