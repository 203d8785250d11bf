r"""Trains language models on text: a base, one expert per domain, and a generalist.

    python -m experiments.train_lm_experts --run_dir=runs/lm --preset=demo
    python -m experiments.train_lm_experts --run_dir=runs/mine \
        --domains=law=texts/law,code=src/**/*.py,man

Without ``--domains`` the text is what Python and Debian ship. Whole files are held out,
near-duplicates of training text among them dropped. With ``--regime=shared`` every expert
starts from one base, with ``scratch`` from weights of its own; the generalist gets as many
updates as all the others together. ``models/<name>`` are folders as Hugging Face's
transformers reads them, ``text/`` holds the tokens, the held-out documents and the windows
that every method is scored on, ``result.json`` the bits per byte. Rerun to resume.
"""

import dataclasses
import functools
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.data.text import TextConfig, load_corpora
from emfuse_jax.data.text_sources import available_sources, parse_sources
from emfuse_jax.data.tokens import sample_token_windows, token_streams
from emfuse_jax.llm.config import LmConfig
from emfuse_jax.llm.model import init_params
from emfuse_jax.llm.tokenizer import load_tokenizer
from emfuse_jax.llm.train import LmTrainConfig, lm_learner, next_token_loss
from emfuse_jax.llm.weights import load_params, save_pretrained
from experiments import _lm
from experiments._measure import require
from experiments._run import Run, open_run, run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmSize:
    """The shape of every model: Llama's architecture, input and output embedding shared.

    Attributes:
        num_layers: blocks.
        hidden_size: width.
        num_heads: attention heads; the width is divided among them.
        num_kv_heads: of them with keys and values of their own.
        intermediate_size: of the gated feed-forward layer.
    """

    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 4
    intermediate_size: int = 344

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 * num_heads="
                f"{2 * self.num_heads}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainLmExpertsConfig:
    """Settings of one family of models.

    Attributes:
        run_dir: where everything goes.
        domains: name=path (file, folder, glob; UTF-8, also .gz), or a default domain:
            python, man, c, docs, perl, legal. None: the first ones that this machine has.
        num_domains: how many defaults, where no domains are given.
        text_from: another run of this command whose text, tokenizer and held-out windows
            are used, so that seeds and regimes are scored alike.
        text: budgets, de-duplication and what is held out.
        tokenizer: bpe, or byte: one token per byte.
        vocab_size: of bpe; 256 bytes and a separator are always among it.
        model: shape.
        regime: shared: experts start from a base trained on all domains; scratch: each
            from its own random weights, for as many updates in all.
        base_steps: updates of the base.
        expert_steps: updates of each expert.
        generalist: also train one model on all domains, with the updates of all the
            others together.
        batch_size: windows per update.
        window: tokens per window, and the models' context length.
        training: optimiser and schedule.
        seed: of weights and batches; the text does not depend on it.
        chunk: updates per compiled call and row of metrics.
        save_every: chunks per checkpoint.
        num_windows: held-out windows per domain, at most.
        prompt: tokens of each that are given; the others are scored.
    """

    run_dir: str = ""
    domains: tuple[str, ...] = ()
    num_domains: int = 3
    text_from: str = ""
    text: TextConfig = TextConfig()  # noqa: RUF009
    tokenizer: Literal["bpe", "byte"] = "bpe"
    vocab_size: int = 1024
    model: LmSize = LmSize()
    regime: Literal["shared", "scratch"] = "shared"
    base_steps: int = 600
    expert_steps: int = 250
    generalist: bool = True
    batch_size: int = 16
    window: int = 128
    training: LmTrainConfig = LmTrainConfig()  # noqa: RUF009
    seed: int = 0
    chunk: int = 50
    save_every: int = 4
    num_windows: int = 360
    prompt: int = 32

    def __post_init__(self) -> None:
        for name in ("num_domains", "batch_size", "chunk", "save_every", "num_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("base_steps", "expert_steps"):
            steps = getattr(self, name)
            if steps < 1 or steps % self.chunk:
                raise ValueError(
                    f"{name}={steps} must be a positive multiple of chunk={self.chunk}"
                )
        if not 1 <= self.prompt < self.window:
            raise ValueError(
                f"prompt={self.prompt} must be at least 1 and below window={self.window}"
            )
        if self.text_from and self.domains:
            raise ValueError(
                "domains and text_from exclude each other: the text of that run is used"
            )
        if "mixed" in {domain.split("=")[0] for domain in self.domains}:
            raise ValueError("no domain can be called mixed; choose another name")


PRESETS = {
    # Shallow and in small batches: so few updates are best spent like this.
    "demo": functools.partial(
        TrainLmExpertsConfig,
        text=TextConfig(max_bytes=2_000_000),
        model=LmSize(num_layers=2),
        base_steps=900,
        expert_steps=300,
        generalist=False,
        batch_size=8,
        num_windows=64,
    ),
    "fast": TrainLmExpertsConfig,
}


class Job(NamedTuple):
    """One model to train: from which parameters, on what, for how many updates."""

    name: str
    start: str
    shares: tuple[float, ...]
    num_steps: int


def plan(config: TrainLmExpertsConfig, domains: Sequence[str]) -> list[Job]:
    """The models of a run, in order; ``start`` is the model that each goes on from."""
    count = len(domains)
    equal = (1.0,) * count
    shared = config.regime == "shared"
    steps = config.expert_steps
    if not shared:
        # The base's updates, divided among the experts, so that the total is the same.
        part = config.base_steps / count / config.chunk
        steps += round(part) * config.chunk
    jobs = [Job("base", "", equal, config.base_steps)] if shared else []
    start = "base" if shared else ""
    for index, name in enumerate(domains):
        own = tuple(float(index == other) for other in range(count))
        jobs.append(Job(f"expert-{name}", start, own, steps))
    if config.generalist:
        jobs.append(Job("generalist", start, equal, count * steps))
    return jobs


def train(config: TrainLmExpertsConfig) -> dict[str, Any]:
    """Trains, writes ``result.json`` and returns what it holds."""
    require(config, "run_dir")
    text = pathlib.Path(config.run_dir) / "text"
    with tempfile.TemporaryDirectory() as temporary:
        # Elsewhere, since text may be refused, and a directory would be left behind.
        found = text if text.exists() else _prepare(config, pathlib.Path(temporary))
        with open_run(
            config.run_dir, config, kind="train_lm_experts", seed=config.seed
        ) as run:
            if not (run.path / "text").exists():
                _copy_whole(found, run.path / "text")
            return _train_all(run, config)


def model_config(size: LmSize, *, vocab_size: int, context_length: int) -> LmConfig:
    """The models' config."""
    return LmConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=size.num_kv_heads,
        context_length=context_length,
        tied=True,
    )


def num_parameters(model: LmConfig) -> int:
    """Numbers in one model, a tied embedding counted once."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def _prepare(config: TrainLmExpertsConfig, temporary: pathlib.Path) -> pathlib.Path:
    """The folder of the text: another run's, or a new one."""
    if config.text_from:
        other = pathlib.Path(config.text_from) / "text"
        window = _lm.read_prepared(other).window
        if window != config.window:
            raise ValueError(
                f"window={config.window}, but the held-out windows of {other} have "
                f"{window} tokens; give --window={window}"
            )
        return other
    if config.domains:
        sources = parse_sources(config.domains)
    else:
        sources = available_sources(config.num_domains)
    print(
        f"reading text: {', '.join(source.name for source in sources)}", file=sys.stderr
    )
    _lm.prepare_text(
        temporary / "text",
        load_corpora(sources, config.text),
        vocab_size=257 if config.tokenizer == "byte" else config.vocab_size,
        window=config.window,
        prompt=config.prompt,
        num_windows=config.num_windows,
    )
    return temporary / "text"


def _train_all(run: Run, config: TrainLmExpertsConfig) -> dict[str, Any]:
    folder = run.path
    prepared = _lm.read_prepared(folder / "text")
    tokenizer = load_tokenizer(folder / "text" / "tokenizer")
    model = model_config(
        config.model,
        vocab_size=tokenizer.vocab_size,
        context_length=config.window,
    )
    learner = lm_learner(model, config.training)
    jobs = plan(config, prepared.domains)
    total = sum(job.num_steps for job in jobs)
    (folder / "models").mkdir(exist_ok=True)
    for number, job in enumerate(jobs):
        if not (folder / "models" / job.name).exists():
            with run.stage(job.name):
                _train_one(config, folder, job, number, model, learner, prepared, total)
    with run.stage("score"):
        return _finish(run, folder, jobs, model, prepared)


def _train_one(
    config: TrainLmExpertsConfig,
    folder: pathlib.Path,
    job: Job,
    number: int,
    model: LmConfig,
    learner: Any,
    prepared: _lm.Prepared,
    total: int,
) -> None:
    """Trains one model in a run directory of its own, and saves it as a whole."""
    width = config.window + 1
    streams = token_streams(prepared.streams, shares=job.shares, window=width)
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    key_init, key_fit = jax.random.split(key)
    start = None
    if job.start:
        start = load_params(folder / "models" / job.start, model)
    settings = {"job": job._asdict(), "config": config}
    path, ignore = folder / "training" / job.name, ("config.run_dir",)
    with open_run(
        path, settings, kind="train_lm", seed=config.seed, ignore=ignore
    ) as run:
        state = run.fit(
            key_fit,
            learner,
            learner.init(key_init, job.num_steps, start),
            functools.partial(
                sample_token_windows, batch_size=config.batch_size, window=width
            ),
            job.num_steps,
            data=jax.tree.map(jnp.asarray, streams),
            chunk=config.chunk,
            save_every=config.save_every,
            description=f"train {job.name}",
            total=total,
        )
    tokenizer = folder / "text" / "tokenizer"
    _save_model(folder / "models" / job.name, state.params, model, tokenizer)


def _save_model(
    path: pathlib.Path, params: Any, model: LmConfig, tokenizer: pathlib.Path
) -> None:
    """A folder of Hugging Face's layout, there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as temporary:
        saved = pathlib.Path(temporary) / path.name
        save_pretrained(saved, params, model, load_tokenizer(tokenizer))
        saved.rename(path)


def _copy_whole(source: pathlib.Path, target: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
        copied = shutil.copytree(source, pathlib.Path(temporary) / target.name)
        copied.rename(target)


def _finish(
    run: Run,
    folder: pathlib.Path,
    jobs: Sequence[Job],
    model: LmConfig,
    prepared: _lm.Prepared,
) -> dict[str, Any]:
    score = _lm.window_scores(functools.partial(next_token_loss, model))
    table: dict[str, dict[str, float]] = {}
    for job in jobs:
        params = load_params(folder / "models" / job.name, model)
        table[job.name] = {
            name: _lm.bits_per_byte(score(params, windows), windows)
            for name, windows in prepared.windows.items()
        }
    result = {
        "domains": list(prepared.domains),
        "text": prepared.counts,
        "num_windows": {name: len(w) for name, w in prepared.windows.items()},
        "num_parameters": num_parameters(model),
        "models": {job.name: job._asdict() for job in jobs},
        "bits_per_byte": table,
        "cpu_seconds": {job.name: run.seconds(f"{job.name}, cpu") for job in jobs},
    }
    run.write_json("result.json", result)
    columns = list(prepared.windows)
    width = max(map(len, table)) + 2
    print("held-out bits per byte")
    print(" " * width + "".join(f"{name:>10}" for name in columns))
    for name, row in table.items():
        print(f"{name:<{width}}" + "".join(f"{row[c]:>10.3f}" for c in columns))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = {"presets": PRESETS, "default_preset": "fast", "trains": True}
    return run_main(train, TrainLmExpertsConfig, argv, **options)


if __name__ == "__main__":
    sys.exit(main())
