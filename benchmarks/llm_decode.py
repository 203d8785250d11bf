"""How many tokens per second does a fusion of language models decode?

    python -m benchmarks.llm_decode --output=runs/bench/llm_decode.json

Greedy decoding from the uniform log-opinion pool of experts of one architecture, beside
Hugging Face's transformers run eagerly with a key-value cache per model and the pool in
Python (`_hf_fusion`): the same float32 weights, random, saved by us and loaded by
transformers. Before anything is timed both decode the same prompts, and different tokens
are refused. Prompts are read before the clock starts.

With two threads a process's CPU time is not what a user waits for, so rates and ratios
are of the wall clock here: they need a quiet machine. Contenders still take turns, with a
pause between them, since threads of either library wait busily for a while.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _report
from benchmarks import _timing as timing
from emfuse_jax.base import LanguageModel, Params
from emfuse_jax.llm.config import LmConfig
from emfuse_jax.llm.decode import decode_tokens, start_decoding
from emfuse_jax.llm.fuse import fuse_language_models
from emfuse_jax.llm.model import init_params, language_model
from emfuse_jax.llm.rules import emselect, uniform
from emfuse_jax.llm.stream import compile_decoder, stream_chunks
from emfuse_jax.llm.weights import save_pretrained
from emfuse_jax.tree import stack
from experiments._run import run_main

NO_PEER = "skipped: torch or transformers is not installed"
TARGETS = {"big, batch 1": 2.2, "big, batch 8": 1.4, "small, batch 1": 8.0}
"""Tokens per second in units of the peer's, on two cores."""


class Size(NamedTuple):
    """An architecture, and how many tokens of it are decoded in a timed call."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    new_tokens: int


SIZES = {
    "big": Size(8, 512, 8, 4, 1376, 32_000, 64),
    "small": Size(4, 128, 4, 2, 344, 1_024, 256),
    "tiny": Size(1, 32, 4, 2, 64, 96, 12),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmDecodeConfig:
    """Settings of the benchmark.

    Attributes:
        sizes: of the experts: big (8 layers, 512 wide, 32 000 tokens) and small (4
            layers, 128 wide, 1024 tokens); embeddings are tied.
        batches: prompts decoded at a time, in turn.
        experts: how many are fused, beside the peer.
        counts: how many are fused to see what each costs.
        prompt: tokens of every prompt.
        repeats: rounds, at least 5.
        threads: cores to use; fewer where there are not so many.
        pause: seconds before every timed call.
        output: the JSON file to write.
        smoke: tiny sizes, to see that everything runs.
    """

    sizes: tuple[str, ...] = ("big", "small")
    batches: tuple[int, ...] = (1, 8)
    experts: int = 3
    counts: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    prompt: int = 32
    repeats: int = 5
    threads: int = 2
    pause: float = 0.3
    output: str = ""
    smoke: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.sizes) - set(SIZES))
        if unknown:
            raise ValueError(
                f"sizes has {', '.join(unknown)}; expected some of {', '.join(SIZES)}"
            )


SMOKE = {
    "sizes": ("tiny",),
    "batches": (2,),
    "counts": (1, 2),
    "prompt": 5,
    "threads": 1,
    "pause": 0.0,
}


def architecture(size: Size, prompt: int) -> LmConfig:
    """The experts' config."""
    shape = size._asdict()
    new_tokens = shape.pop("new_tokens")
    return LmConfig(**shape, context_length=prompt + new_tokens, tied=True)


def random_experts(config: LmConfig, count: int) -> list[Params]:
    """Random weights. Norms are not all one, so that a norm left out would show."""

    def vary(key: jax.Array, leaf: jax.Array) -> jax.Array:
        if leaf.ndim > 1:
            return leaf
        return leaf + 0.3 * jax.random.normal(key, leaf.shape)

    def expert(key: jax.Array) -> Params:
        key_init, key_vary = jax.random.split(key)
        leaves, structure = jax.tree.flatten(init_params(key_init, config))
        keys = jax.random.split(key_vary, len(leaves))
        return jax.tree.unflatten(structure, map(vary, keys, leaves))

    make = jax.jit(expert)
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def prompts(config: LmConfig, batch: int, length: int) -> jax.Array:
    """Random tokens ``[batch, length]``."""
    return jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)


def compiled_decode(
    model: LanguageModel, params: Params, tokens: jax.Array, num_tokens: int
) -> tuple[Callable[[], Any], float]:
    """Greedy decoding after prompts that were read: one call, compiled."""

    def start(params: Params, tokens: jax.Array) -> Any:
        valid = jnp.ones(tokens.shape, bool)
        return start_decoding(params, model, tokens, valid, num_tokens)

    def run(params: Params, key: jax.Array, state: Any) -> Any:
        return decode_tokens(params, key, model, state, num_tokens, temperature=0.0)[1]

    state = jax.jit(start)(params, tokens)
    return timing.compiled(run, params, jax.random.key(2), state)


def open_peer(config: LmConfig, members: Sequence[Params]) -> Any:
    """The same experts in transformers, through files that we write; None without it."""
    try:
        from benchmarks._hf_fusion import Fusion
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        folders = []
        for index, params in enumerate(members):
            folders.append(pathlib.Path(temporary) / f"expert-{index}")
            save_pretrained(folders[-1], params, config)
        return Fusion(folders)


def compare_tokens(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Refuses to compare the speed of different computations.

    Raises:
        RuntimeError: if any token differs.
    """
    if not np.array_equal(ours, theirs):
        row, column = (int(i) for i in np.argwhere(ours != theirs)[0])
        raise RuntimeError(
            f"row {row} differs from token {column} on: ours and the peer do not compute "
            "the same thing, so their speeds cannot be compared"
        )
    return {"equal_tokens": ours.size, "distinct_tokens": len(np.unique(ours))}


def wall_ratio(
    timings: Mapping[str, timing.Timing], name: str, peer: str
) -> dict[str, float]:
    """How many times faster ``name`` is than ``peer`` by the clock, round by round."""
    pairs = zip(timings[peer].wall, timings[name].wall, strict=True)
    return timing.spread([theirs / ours for theirs, ours in pairs])


def summarise(timings: Mapping[str, timing.Timing], tokens: int) -> dict[str, Any]:
    """Seconds and tokens per second of each contender."""
    return {
        name: {
            **t.summary(tokens),
            "tokens_per_second": timing.spread([tokens / s for s in t.wall]),
            "tokens_per_call": tokens,
        }
        for name, t in timings.items()
    }


def beside_peer(
    config: LlmDecodeConfig,
    size: Size,
    batch: int,
    members: Sequence[Params],
    peer: Any,
) -> dict[str, Any]:
    """Rates of our ways to decode and of the peer's, on the same prompts."""
    lm = architecture(size, config.prompt)
    model, count = language_model(lm), len(members)
    tokens = prompts(lm, batch, config.prompt)
    stacked = stack(members)
    contenders = {
        "emfuse": (fuse_language_models(model, uniform(), num_models=count), stacked),
        "emselect": (
            fuse_language_models(model, emselect(), num_models=count),
            stacked,
        ),
        "emfuse_tuple": (
            fuse_language_models([model] * count, uniform()),
            tuple(members),
        ),
    }
    calls, seconds = {}, {}
    for name, (fused, params) in contenders.items():
        calls[name], seconds[name] = compiled_decode(
            fused, params, tokens, size.new_tokens
        )
    same: Any = NO_PEER
    if peer is not None:
        peer.prefill(np.asarray(tokens))
        calls["transformers"] = functools.partial(peer.decode, size.new_tokens)
        theirs = calls["transformers"]().numpy()
        same = {
            name: compare_tokens(np.asarray(calls[name]().tokens), theirs)
            for name in ("emfuse", "emfuse_tuple")
        }
    timings = timing.measure(
        calls, repeats=config.repeats, compile_seconds=seconds, pause=config.pause
    )
    ratios = {
        name: wall_ratio(timings, "emfuse", name) for name in calls if name != "emfuse"
    }
    return {
        "contenders": summarise(timings, batch * size.new_tokens),
        "same_computation": same,
        "ratio_of_emfuse_to": ratios,
    }


def cost_of_experts(
    config: LlmDecodeConfig, size: Size, members: Sequence[Params]
) -> dict[str, Any]:
    """Seconds of one prompt's decode with each number of experts, in units of one's.

    Pairs are measured, each number beside one expert, so that not every stack of
    parameters is held at a time.
    """
    lm = architecture(size, config.prompt)
    tokens = prompts(lm, 1, config.prompt)

    def compiled(count: int) -> tuple[Callable[[], Any], float]:
        fused = fuse_language_models(language_model(lm), uniform(), num_models=count)
        params = stack(members[:count])
        return compiled_decode(fused, params, tokens, size.new_tokens)

    first, result = compiled(1), {}
    one = first[0]
    for count in config.counts:
        call, seconds = first if count == 1 else compiled(count)
        timings = timing.measure(
            {"one": one, "several": call},
            repeats=config.repeats,
            compile_seconds={"several": seconds},
        )
        row = summarise(timings, size.new_tokens)["several"]
        ratio = wall_ratio(timings, "one", "several")
        result[str(count)] = {**row, "cost_in_units_of_one_expert": ratio}
    return result


def count_compilations(
    config: LlmDecodeConfig, size: Size, members: Sequence[Params]
) -> dict[str, int]:
    """Programs that a decoder needs for prompts whose lengths fill two buckets.

    Raises:
        RuntimeError: if there is more than one per bucket.
    """
    chunk, longest = 4, 32
    lm = architecture(size, longest + chunk)
    model = fuse_language_models(language_model(lm), uniform(), num_models=len(members))
    decoder = compile_decoder(model, chunk=chunk, temperature=0.0)
    params, key = stack(members), jax.random.key(3)
    tokens = np.asarray(prompts(lm, 1, longest))[0].tolist()
    for length in (1, 9, 16, 17, 25, longest):
        for _ in stream_chunks(params, key, decoder, [tokens[:length]], chunk):
            pass
    found = {
        "buckets": 2,
        "prefill": decoder.start._cache_size(),  # pyright: ignore[reportFunctionMemberAccess]
        "decode": decoder.advance._cache_size(),  # pyright: ignore[reportFunctionMemberAccess]
    }
    if found["prefill"] != 2 or found["decode"] != 2:
        raise RuntimeError(
            f"prompts of 1 to {longest} tokens fill two buckets and needed "
            f"{found['prefill']} (prefill) and {found['decode']} (decode) programs"
        )
    return found


def measure(config: LlmDecodeConfig) -> dict[str, Any]:
    """Everything, size by size."""
    results: dict[str, Any] = {"beside_transformers": {}, "cost_of_experts": {}}
    for name in config.sizes:
        size = SIZES[name]
        lm = architecture(size, config.prompt)
        members = random_experts(lm, max(config.experts, *config.counts))
        some = members[: config.experts]
        peer = open_peer(lm, some)
        for batch in config.batches:
            results["beside_transformers"][f"{name}, batch {batch}"] = beside_peer(
                config, size, batch, some, peer
            )
        results["cost_of_experts"][name] = cost_of_experts(config, size, members)
        results["compilations"] = count_compilations(config, size, some)
    results["targets"] = {
        name: {"target": target, "reached": ratio["median"]}
        for name, target in TARGETS.items()
        if (study := results["beside_transformers"].get(name))
        and (ratio := study["ratio_of_emfuse_to"].get("transformers"))
    }
    return results


def report(results: dict[str, Any]) -> str:
    """The results as text."""
    lines = []
    for name, study in results["beside_transformers"].items():
        lines.append(f"{name}: tokens per second (wall clock)")
        for contender, summary in study["contenders"].items():
            rate = summary["tokens_per_second"]
            lines.append(
                f"  {contender:16s} {rate['median']:10.4g} "
                f"({rate['min']:.4g} to {rate['max']:.4g})"
            )
        lines.append("emfuse is so many times faster than")
        for other, ratio in study["ratio_of_emfuse_to"].items():
            lines.append(_report.ratio_line(other, ratio))
        lines.append(f"  same computation: {study['same_computation']}")
    for name, costs in results["cost_of_experts"].items():
        parts = (
            f"{count}: {row['cost_in_units_of_one_expert']['median']:.2f}"
            for count, row in costs.items()
        )
        lines.append(f"cost of experts, {name}: {', '.join(parts)}")
    lines += [
        f"{name}: {row['reached']:.2f} of {row['target']} asked for"
        for name, row in results["targets"].items()
    ]
    lines.append(f"programs: {results['compilations']}")
    return "\n".join(lines)


def main(config: LlmDecodeConfig) -> dict[str, Any]:
    """Measures, prints and writes."""
    _report.check_repeats(config.repeats)
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else (0, 1)
    with timing.quiet_machine(min(config.threads, len(cores))) as machine:
        results = measure(config)
    question = (__doc__ or "").partition("\n")[0]
    document = timing.write(config.output, question, config, machine, results)
    print(report(results))
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, LlmDecodeConfig))
