r"""Which way of fusing language models predicts held-out text best, and where does it lose?

    python -m benchmarks.llm_study --work=runs/llm_study --out=runs/bench/llm_study.json

For every training seed and regime (experts from one base, or each from its own random
weights) it trains experts and a generalist of equal total compute
(`experiments.train_lm_experts`), merges the experts (soups, RegMean), and scores all
methods on the same held-out text: bits per byte of each domain and of texts whose domain
changes every 64 tokens, and which of four continuations a prompt's own is. The experts'
laws are computed once; every rule of fusion reads them.

All options are chosen on validation documents, none of which is reported. Intervals are
over documents, of means over training seeds. The JSON is written after every model family;
rerun to resume.
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import numpy as np

from benchmarks import _llm_measure as measure
from benchmarks import _llm_rules as rules
from benchmarks import _llm_tables as tables
from benchmarks import _llm_texts as texts
from benchmarks._llm_families import (
    LlmStudyConfig,
    Material,
    describe_material,
    gather_material,
    refuse_changes,
    same_text,
    shrink,
    train_family,
)
from benchmarks._timing import portable
from emfuse_jax import artifacts
from emfuse_jax.base import Params
from emfuse_jax.llm.weights import load_params
from emfuse_jax.merging import greedy_soup, model_soup
from experiments import train_lm_experts as training
from experiments._run import run_main

Scores = dict[str, dict[str, np.ndarray]]
"""By table and method."""


class Family:
    """The trained models of one seed and regime, and how texts are scored by them."""

    def __init__(
        self, config: LlmStudyConfig, folder: pathlib.Path, material: Material
    ):
        self.config, self.material = config, material
        lm = training.model_config(
            config.experts.model,
            vocab_size=len(material.token_bytes),
            context_length=config.experts.window,
        )
        self.models = compiled_models(lm)
        trained = {
            path.name: load_params(path, lm)
            for path in sorted((folder / "models").iterdir())
        }
        self.experts = [trained.pop(f"expert-{name}") for name in material.domains]
        self.plain: dict[str, Params] = trained

    def score(self, material: texts.Texts, prompt: int, **options: Any) -> Any:
        """See `measure.score_texts`."""
        return measure.score_texts(
            self.models, self.experts, material, prompt, **options
        )

    def bits(self, nats: np.ndarray, material: texts.Texts, prompt: int) -> float:
        """Bits per byte of texts, from the nats of their tokens."""
        size = self.material.token_bytes[material.tokens[:, prompt:]].sum()
        return float(nats.sum(dtype=np.float64) / np.log(2.0) / size)

    def validation_losses(
        self, candidates: Sequence[tuple[str, rules.Options]]
    ) -> dict[tuple[str, rules.Options], float]:
        """Bits per byte of rules on validation documents: the mean over domains and that
        of mixed texts, in equal parts."""
        prompt = self.config.experts.prompt
        scorers = {rule: rules.scorer(*rule) for rule in candidates}
        found = {}
        for table, own in self.material.validation.items():
            nats = self.score(own, prompt, rules=scorers)[0]
            found[table] = {r: self.bits(nats[r], own, prompt) for r in candidates}
        return {
            rule: float(
                0.5 * np.mean([found[name][rule] for name in self.material.domains])
                + 0.5 * found["mixed"][rule]
            )
            for rule in candidates
        }

    def plain_loss(self, params: Params) -> float:
        """Bits per byte of a single model on validation documents, mean over domains."""
        prompt = self.config.experts.prompt
        found = []
        for name in self.material.domains:
            own = self.material.validation[name]
            nats = measure.plain_losses(self.models, params, own.tokens)[
                :, prompt - 1 :
            ]
            found.append(self.bits(nats, own, prompt))
        return float(np.mean(found))

    def merge(self) -> dict[str, Any]:
        """Adds soups and RegMean to the single models; returns what was chosen."""
        self.plain["soup"] = model_soup(self.experts)
        greedy = greedy_soup(self.experts, lambda params: -self.plain_loss(params))
        self.plain["soup, greedy"] = greedy.params
        rows = [
            measure.sample_rows(
                stream, self.config.gram_texts, self.config.experts.window, index
            )
            for index, stream in enumerate(self.material.streams)
        ]
        tried = {}
        for shrinkage in (0.0, 0.1, 0.9):
            merged = self.models.regmean(self.experts, rows, shrinkage)
            tried[shrinkage] = (self.plain_loss(merged), merged)
        best = min(tried, key=lambda shrinkage: tried[shrinkage][0])
        self.plain["regmean"] = tried[best][1]
        return {
            "soup, greedy": {"members": greedy.members, "loss": -greedy.score},
            "regmean": {
                "options": {"shrinkage": best},
                "tried": [
                    {"shrinkage": s, "loss": loss} for s, (loss, _) in tried.items()
                ],
            },
        }


@functools.cache
def compiled_models(lm: Any) -> measure.Models:
    """One set of compiled functions for all families."""
    return measure.Models(lm)


def score_family(
    config: LlmStudyConfig, folder: pathlib.Path, material: Material
) -> tuple[Scores, dict[str, Any]]:
    """All numbers of one family: ``[text]`` by table and method, and the rest."""
    family = Family(config, folder, material)
    chosen = {**family.merge(), **choose_rules(family)}
    used = {name: rules.scorer(*rule) for name, rule in rules.FIXED.items()}
    for name, found in chosen.items():
        if "rule" in found:
            options = tuple(found["options"].items())
            used[name] = rules.scorer(found["rule"], options)
    found: Scores = {}
    facts: dict[str, Any] = {"chosen": chosen, "choices": {}, "pool": {}}
    prompt = config.experts.prompt
    for name, own in material.reported.items():
        here = used
        if name == "mixed":
            anew = {
                f"{rule}, re-estimated": rules.rolling(used[rule], stride(config))
                for rule in ("packllm_opt", "packllm_sim, τ=0.1")
            }
            here = {**used, **anew}
        options = {"rules": here, "plain": family.plain, "watch": measure.choices}
        nats, watched = family.score(own, prompt, **options)
        found[f"nats, {name}"] = _sums(nats)
        domain = own.domain[:, prompt:]
        facts["choices"][name] = measure.describe_choices(watched, domain)
        if name == "mixed":
            # Per token by position after a change; the first segment holds the prompt.
            facts["nats by position"] = _by_position(nats, config)
            continue
        long = family.score(own, config.long_prompt, rules=used, plain=family.plain)[0]
        found[f"nats, {name}, long prompt"] = _sums(long)
        asked = material.questions[name]
        options = {"rules": used, "plain": family.plain}
        given = _sums(family.score(asked.texts, prompt, **options)[0])
        found[f"correct, {name}"] = {
            method: np.argmin(nats.reshape(-1, asked.num_options), axis=1) == 0
            for method, nats in given.items()
        }
        facts["pool"][name] = measure.sample_pool(
            family.models,
            family.experts,
            own.tokens[: config.pool_texts, :prompt],
            config.pool_tokens,
            config.experts.seed,
        )
    return found, facts


def choose_rules(family: Family) -> dict[str, Any]:
    """Options of every rule on validation documents, and the rule that is ours."""
    candidates = [
        (name, options) for name, every in rules.CHOSEN.values() for options in every
    ]
    found = rules.choose(rules.CHOSEN, family.validation_losses(candidates))
    best = min(rules.OURS, key=lambda name: found[name]["loss"])
    return {**found, "ours": {**found[best], "family": best, "tried": []}}


def stride(config: LlmStudyConfig) -> int:
    """Tokens between two estimates of a rule that is re-estimated: half a prompt."""
    return max(config.experts.prompt // 2, 1)


def _sums(nats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: rows.sum(axis=1, dtype=np.float64) for name, rows in nats.items()}


def _by_position(
    nats: Mapping[str, np.ndarray], config: LlmStudyConfig
) -> dict[str, list[float]]:
    """Mean nats per token by its position in a segment, over all but the first."""
    segment, first = config.segment, config.segment - config.experts.prompt
    return {
        name: rows[:, first:]
        .reshape(-1, segment)
        .mean(axis=0, dtype=np.float64)
        .round(4)
        .tolist()
        for name, rows in nats.items()
    }


def _shown(facts: Mapping[str, Any]) -> dict[str, list[float]]:
    """By position, four at a time, of methods that take a change of domain differently."""
    names = ("emfuse", "packllm_opt", "packllm_opt, re-estimated", "ours", "own_expert")
    return {
        name: np.reshape(facts["nats by position"][name], (-1, 4)).mean(axis=1).tolist()
        for name in names
    }


def load_scores(path: pathlib.Path) -> tuple[Scores, dict[str, Any]]:
    """What `save_scores` wrote."""
    found: Scores = {}
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        for name in arrays.files:
            table, method = name.split("|")
            found.setdefault(table, {})[method] = arrays[name]
    return found, artifacts.read_json(path.with_suffix(".json"))["facts"]


def save_scores(
    path: pathlib.Path, config: Any, found: Scores, facts: dict[str, Any]
) -> None:
    """Writes one family's scores; the JSON comes last and says that they are whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{table}|{method}": rows
        for table, methods in found.items()
        for method, rows in methods.items()
    }
    np.savez(path.with_suffix(".npz"), **arrays)
    artifacts.write_json(path.with_suffix(".json"), {"config": config, "facts": facts})


def settings(config: LlmStudyConfig) -> dict[str, Any]:
    """What scores depend on, as JSON."""
    found = artifacts.to_json(config)
    for name in ("seeds", "regimes", "work", "out", "smoke"):
        del found[name]
    for name in ("run_dir", "text_from", "regime", "seed"):
        del found["experts"][name]
    return found


def run_family(
    config: LlmStudyConfig, regime: str, seed: int
) -> tuple[Scores, dict[str, Any], Material]:
    """Trains and scores one family, or finds its scores."""
    folder = train_family(config, regime, seed)
    own = dataclasses.replace(
        config, experts=dataclasses.replace(config.experts, seed=seed)
    )
    material = gather_material(own, folder)
    path = pathlib.Path(config.work) / "scores" / f"{regime}-seed{seed}"
    if path.with_suffix(".json").exists():
        known = artifacts.read_json(path.with_suffix(".json"))["config"]
        refuse_changes(path, artifacts.differences(known, settings(config)))
    else:
        found, facts = score_family(own, folder, material)
        trained = artifacts.read_json(folder / "result.json")
        facts |= {
            name: trained[name] for name in ("cpu_seconds", "num_parameters", "text")
        }
        save_scores(path, settings(config), found, facts)
    return *load_scores(path), material


def summarise(
    config: LlmStudyConfig, material: Material, found: Sequence[Scores]
) -> dict[str, Any]:
    """Tables of one regime over its seeds."""

    def joined(table: str) -> dict[str, np.ndarray]:
        names = set.intersection(*(set(scores[table]) for scores in found))
        order = [name for name in found[0][table] if name in names]
        return {name: np.stack([s[table][name] for s in found]) for name in order}

    def resamples(name: str, prompt: int | None, seed: int) -> tables.Resamples:
        own = material.reported[name]
        if prompt is None:
            units = material.questions[name].texts.units
            return tables.Resamples(units, np.ones(len(units)), seed)
        size = material.token_bytes[own.tokens[:, prompt:]].sum(axis=1)
        return tables.Resamples(own.units, size * np.log(2.0), seed)

    def table(
        form: str, prompt: int | None, columns: Sequence[str], against: Sequence[str]
    ) -> dict[str, Any]:
        scores = {name: joined(form.format(name)) for name in columns}
        draws = {name: resamples(name, prompt, i) for i, name in enumerate(columns)}
        return tables.table(scores, draws, material.domains, against=against)

    prompt, domains = config.experts.prompt, material.domains
    against = ("packllm_opt",)
    every = (*domains, "mixed")
    form = "nats, {}, long prompt"
    return {
        "bits_per_byte": table("nats, {}", prompt, every, against),
        "bits_per_byte_long_prompt": table(form, config.long_prompt, domains, against),
        "accuracy": table("correct, {}", None, domains, against),
    }


def report(regimes: Mapping[str, Any], domains: Sequence[str]) -> str:
    """The tables as text."""
    lines = []
    for regime, part in regimes.items():
        for name, found in part["tables"].items():
            columns = [*domains, "mean"] + ["mixed"] * (name == "bits_per_byte")
            text = tables.text_table(
                found["values"], columns, descending=name.startswith("accuracy")
            )
            lines += [f"{regime}: {name}", text, ""]
    return "\n".join(lines)


def main(config: LlmStudyConfig) -> dict[str, Any]:
    """Runs the study and writes its JSON after every family."""
    if config.smoke:
        config = shrink(config)
    found: dict[str, dict[str, Scores]] = {regime: {} for regime in config.regimes}
    facts: dict[str, dict[str, Any]] = {regime: {} for regime in config.regimes}
    document: dict[str, Any] = {}
    material: Material | None = None
    for seed in config.seeds:
        for regime in config.regimes:
            scores, own, found_text = run_family(config, regime, seed)
            material = same_text(found_text, material)
            found[regime][str(seed)], facts[regime][str(seed)] = scores, own
            regimes = {
                name: {
                    "tables": summarise(config, material, list(scores.values())),
                    "seeds": {
                        seed: {**own, "nats by position": _shown(own)}
                        for seed, own in facts[name].items()
                    },
                }
                for name, scores in found.items()
                if scores
            }
            document = {
                "question": (__doc__ or "").partition("\n")[0],
                "domains": material.domains,
                "material": describe_material(material),
                "regimes": regimes,
                "config": artifacts.to_json(config),
                "provenance": artifacts.provenance(),
            }
            if config.out:
                path = pathlib.Path(config.out)
                path.parent.mkdir(parents=True, exist_ok=True)
                artifacts.write_json(path, portable(tables.rounded(document)))
            print(f"{regime}, seed {seed}: done", flush=True)
    print(report(document["regimes"], document["domains"]))
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, LlmStudyConfig))
