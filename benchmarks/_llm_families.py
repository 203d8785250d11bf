"""The settings of `llm_study`, its families of trained models, and what they are scored on."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import _llm_texts as texts
from emfuse_jax import artifacts
from experiments import _lm
from experiments import train_lm_experts as training


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmStudyConfig:
    """Settings of the study.

    Attributes:
        experts: how the models are trained; ``run_dir``, ``text_from``, ``regime`` and
            ``seed`` are set by the study.
        seeds: of weights and batches.
        regimes: shared, scratch, or both.
        validation: fraction of the held-out documents that choices are made on.
        segment: tokens until a mixed text changes its domain.
        num_mixed: mixed texts to report, at most.
        num_validation: texts per domain, and mixed ones, to choose on, at most.
        long_prompt: a second length of the prompts, in tokens.
        answer: tokens of a multiple choice's answers; every window asks two questions.
        gram_texts: windows of training text per domain that RegMean measures on.
        pool_texts: texts per domain that the pool writes, for divergences along them.
        pool_tokens: of each.
        work: where trained models and scores are kept.
        out: the JSON result.
        smoke: tiny sizes, to see that everything runs.
    """

    experts: training.TrainLmExpertsConfig = training.TrainLmExpertsConfig(  # noqa: RUF009
        window=256, batch_size=8, num_windows=240
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    regimes: tuple[str, ...] = ("shared", "scratch")
    validation: float = 0.3
    segment: int = 64
    num_mixed: int = 180
    num_validation: int = 40
    long_prompt: int = 128
    answer: int = 32
    gram_texts: int = 64
    pool_texts: int = 24
    pool_tokens: int = 64
    work: str = "runs/llm_study"
    out: str = ""
    smoke: bool = False

    def __post_init__(self) -> None:
        if not self.regimes or not set(self.regimes) <= {"shared", "scratch"}:
            raise ValueError(
                f"regimes={','.join(self.regimes)}; expected shared, scratch, or both"
            )
        window, prompt = self.experts.window, self.experts.prompt
        if not prompt < self.long_prompt < window:
            raise ValueError(
                f"long_prompt={self.long_prompt} must be between experts.prompt={prompt} "
                f"and experts.window={window}"
            )
        if not 0 < self.answer <= window // 2 - prompt:
            raise ValueError(
                f"answer={self.answer} must be positive, and two questions of experts.prompt="
                f"{prompt} and answer have to fit into experts.window={window}"
            )
        if not 0 < self.pool_tokens <= window - prompt:
            raise ValueError(
                f"pool_tokens={self.pool_tokens} must be positive and fit after the prompt: "
                f"at most {window - prompt}"
            )
        if window % self.segment or not prompt <= self.segment < window:
            raise ValueError(
                f"segment={self.segment} must divide experts.window={window}, and be at "
                f"least experts.prompt={prompt}"
            )
        if not 0.0 < self.validation < 1.0:
            raise ValueError(f"validation={self.validation} must be in (0, 1)")


def shrink(config: LlmStudyConfig) -> LlmStudyConfig:
    """Tiny sizes."""
    experts = dataclasses.replace(
        config.experts,
        model=training.LmSize(
            num_layers=1,
            hidden_size=16,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=32,
        ),
        vocab_size=280,
        base_steps=20,
        expert_steps=20,
        chunk=20,
        batch_size=4,
        window=32,
        prompt=8,
        num_windows=16,
    )
    return dataclasses.replace(
        config,
        experts=experts,
        segment=8,
        num_mixed=8,
        num_validation=8,
        long_prompt=16,
        answer=8,
        gram_texts=16,
        pool_texts=2,
        pool_tokens=8,
    )


class Material(NamedTuple):
    """What is scored: texts by table, to choose on and to report, and the questions."""

    domains: tuple[str, ...]
    validation: dict[str, texts.Texts]
    reported: dict[str, texts.Texts]
    questions: dict[str, texts.Questions]
    token_bytes: np.ndarray
    streams: tuple[np.ndarray, ...]


def gather_material(config: LlmStudyConfig, folder: pathlib.Path) -> Material:
    """Texts and questions from the text of a trained family."""
    prepared = _lm.read_prepared(folder / "text")
    tokenizer = _lm.load_tokenizer(folder / "text" / "tokenizer")
    domains = prepared.domains
    parted = [
        texts.part_documents(prepared.windows[name], config.validation)
        for name in domains
    ]
    material = []
    for side in (0, 1):
        windows = [parts[side] for parts in parted]
        count = config.num_mixed
        if side == 0:
            count = config.num_validation
            windows = [own[:count] for own in windows]
        found = {
            name: texts.texts_of(own, index)
            for index, (name, own) in enumerate(zip(domains, windows, strict=True))
        }
        found["mixed"] = texts.mixed_texts(windows, config.segment, count)
        material.append(found)
    asked = {
        name: texts.questions(
            parts[1],
            prepared.windows[name],
            index,
            prompt=config.experts.prompt,
            answer=config.answer,
            starts=(0, config.experts.window // 2),
        )
        for index, (name, parts) in enumerate(zip(domains, parted, strict=True))
    }
    return Material(
        domains,
        *material,
        questions=asked,
        token_bytes=texts.token_bytes(tokenizer),
        streams=prepared.streams,
    )


def train_family(config: LlmStudyConfig, regime: str, seed: int) -> pathlib.Path:
    """Trains one family of models, or finds it; all read the first one's text.

    Raises:
        ValueError: if a family that is there was trained with other settings.
    """
    work = pathlib.Path(config.work)
    first = work / f"{config.regimes[0]}-seed{config.seeds[0]}"
    folder = work / f"{regime}-seed{seed}"
    own = {"run_dir": str(folder), "regime": regime, "seed": seed}
    if folder != first:
        own |= {"text_from": str(first), "domains": ()}
    wanted = dataclasses.replace(config.experts, **own)
    if (folder / "result.json").exists():
        # Whole already; whose copy of the text it has may depend on how it was asked for.
        known = artifacts.read_json(folder / "config.json")["config"]
        free = ("run_dir", "text_from", "domains")
        changed = [
            line
            for line in artifacts.differences(known, artifacts.to_json(wanted))
            if line.split(":")[0] not in free
        ]
        refuse_changes(folder, changed)
        return folder
    training.train(wanted)
    return folder


def refuse_changes(path: pathlib.Path, changed: Sequence[str]) -> None:
    """Raises a ValueError where something kept in ``--work`` had other settings."""
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed[:5])}); give the "
            "same, or choose another --work"
        )


def same_text(material: Material, first: Material | None) -> Material:
    """Checks that a family is scored on the text of the first.

    Raises:
        ValueError: if not; their scores cannot stand in one table.
    """
    if first is not None:
        pairs = [(first.reported[name], own) for name, own in material.reported.items()]
        if not all(np.array_equal(a.tokens, b.tokens) for a, b in pairs):
            raise ValueError(
                "families in --work were prepared from different text; train them anew, "
                "in another folder"
            )
    return material


def describe_material(material: Material) -> dict[str, Any]:
    """How many texts and documents each table has."""
    sides = {"validation": material.validation, "reported": material.reported}
    return {
        side: {
            name: {"texts": len(own.tokens), "documents": len(set(own.units))}
            for name, own in found.items()
        }
        for side, found in sides.items()
    }
