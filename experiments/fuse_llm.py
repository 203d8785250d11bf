r"""Fuses language models at inference: text, chat, benchmark tasks, held-out scores.

    python -m experiments.fuse_llm --experts=runs/lm --rule=emfuse --prompt="def read("
    python -m experiments.fuse_llm --experts=a,b,c --rule=emselect:order=pool --chat
    python -m experiments.fuse_llm --experts=a,b --rule=packllm_sim:temperature=0.1 \
        --tasks=arc_easy --run_dir=runs/arc
    python -m experiments.fuse_llm --experts=runs/lm --score=runs/lm \
        --rule=emfuse,packllm_opt,evidence --run_dir=runs/scores

Experts are folders as Hugging Face's, or a run of train_lm_experts. Rules are written
name:option=value; several are tried in turn. Text is streamed, coloured by expert where the
output is a terminal, and kept as JSON and as one HTML file in the run directory. Scores are
bits per byte of experts, other models and rules on the held-out windows of a run of
train_lm_experts, with 95 % intervals over documents. Rerun to resume.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from emfuse_jax.artifacts.config import read_json, replace_file, write_json
from emfuse_jax.llm.tokenizer import load_tokenizer
from experiments import _lm_text
from experiments._lm import read_prepared
from experiments._lm_chat import converse
from experiments._lm_decode import (
    Sampling,
    check_fits,
    decode_passage,
    make_voice,
    prompt_tokens,
    read_prompts,
    summary,
)
from experiments._lm_experts import (
    Experts,
    expand_runs,
    join_params,
    open_experts,
)
from experiments._lm_matrix import Matrix, ScoreOptions, score_table
from experiments._lm_rules import NamedRule, parse_rules
from experiments._lm_tasks import TaskOptions
from experiments._measure import require
from experiments._run import Run, open_run, run_main
from experiments._tables import markdown_table, to_plain

KIND = "fuse_llm"
_MODES = ("prompt", "prompt_file", "chat", "tasks", "score")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseLlmConfig:
    """Settings of a fusion of language models.

    Attributes:
        experts: folders with config.json, safetensors and a tokenizer; a run of
            train_lm_experts stands for all its experts.
        rule: how experts are weighed; emfuse, emselect, packllm_sim, evidence, … Options
            follow as in emselect:order=pool:alpha=0.5; several rules are tried in turn.
        weights: one per expert, for emfuse, fixed and linear_pool.
        temperatures: one per expert, of its law; none is 1 for all.
        map_vocabulary: map the experts' tokens onto those of the first where they differ.
        min_exact: the least fraction of each vocabulary that has to match exactly then.
        dtype: to convert the weights to; none is the checkpoint's own.
        ignore: keys of config.json that you know not to change the logits.
        prompt: text to continue.
        prompt_file: a text file to continue as a whole, or .jsonl with one
            {"prompt": "..."} per line.
        chat: talk at the terminal.
        system: what a chat template puts before everything.
        tasks: of lm-evaluation-harness, by name.
        score: a run of train_lm_experts whose held-out windows are scored.
        run_dir: where results go; text and chat can do without.
        sampling: of text.
        task: of tasks.
        scoring: of scores.
        colour: by expert; auto is where the output is a terminal.
        seed: of everything that is drawn.
    """

    experts: tuple[str, ...] = ()
    rule: tuple[str, ...] = ("emfuse",)
    weights: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = ()
    map_vocabulary: bool = False
    min_exact: float = 0.9
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    ignore: tuple[str, ...] = ()
    prompt: str = ""
    prompt_file: str = ""
    chat: bool = False
    system: str = ""
    tasks: tuple[str, ...] = ()
    score: str = ""
    run_dir: str = ""
    sampling: Sampling = Sampling()  # noqa: RUF009
    task: TaskOptions = TaskOptions()  # noqa: RUF009
    scoring: ScoreOptions = ScoreOptions()  # noqa: RUF009
    colour: Literal["auto", "always", "never"] = "auto"
    seed: int = 0


def fuse(config: FuseLlmConfig) -> dict[str, Any] | None:
    """Does what is asked for; returns what ``result.json`` holds (of chat, nothing)."""
    require(config, "experts")
    modes = [mode for mode in _MODES if getattr(config, mode)]
    if len(modes) != 1:
        told = " and ".join(f"--{mode}" for mode in modes) or "none, or an empty one"
        raise ValueError(
            f"give one of {', '.join(f'--{mode}' for mode in _MODES)}, not {told}"
        )
    _check_counts(config)
    rules = parse_rules(config.rule, config.weights)
    run = {
        "prompt": _prompts,
        "prompt_file": _prompts,
        "chat": _chat,
        "tasks": _tasks,
        "score": _score,
    }[modes[0]]
    return run(config, rules)


def _check_counts(config: FuseLlmConfig) -> None:
    count = len(expand_runs(config.experts))
    for name in ("weights", "temperatures"):
        values = getattr(config, name)
        if values and len(values) != count:
            raise ValueError(
                f"--{name}={','.join(map(str, values))} has {len(values)} values for "
                f"{count} experts; give one for each"
            )


def _open(config: FuseLlmConfig, others: Sequence[str] = ()) -> Experts:
    """The experts, then the others, whose temperatures are 1."""
    temperatures = config.temperatures
    if temperatures:
        every = len(expand_runs([*config.experts, *others]))
        temperatures += (1.0,) * (every - len(temperatures))
    return open_experts(
        [*config.experts, *others],
        temperatures=temperatures,
        map_vocabulary=config.map_vocabulary,
        min_exact=config.min_exact,
        dtype=config.dtype,
        ignore=config.ignore,
    )


def _open_run(config: FuseLlmConfig) -> Any:
    """The run directory; without one, a context that writes nothing."""
    if not config.run_dir:
        return contextlib.nullcontext()
    ignore = ("run_dir", "colour", "sampling.chunk", "task.batch_size")
    return open_run(config.run_dir, config, kind=KIND, seed=config.seed, ignore=ignore)


def _prompts(config: FuseLlmConfig, rules: Sequence[NamedRule]) -> dict[str, Any]:
    """Continues every prompt under every rule."""
    prompts = [config.prompt] if config.prompt else read_prompts(config.prompt_file)
    experts = _open(config)
    params = join_params(experts)
    experts = experts._replace(params=())
    voices = [make_voice(experts, params, rule, config.sampling) for rule in rules]
    tokens = [prompt_tokens(experts, prompt, config.sampling) for prompt in prompts]
    for number, row in enumerate(tokens):
        try:
            check_fits(voices[0], row)
        except ValueError as error:
            what = str(error).replace("prompt 0", f"prompt {number}")
            raise ValueError(
                f"{what} (--sampling.max_new_tokens={config.sampling.max_new_tokens})"
            ) from error
    colour = _coloured(config)
    passages = []
    with _open_run(config) as run:
        for number, (prompt, row) in enumerate(zip(prompts, tokens, strict=True)):
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            for voice in voices:
                decode = functools.partial(
                    _speak, voice, key, row, prompt=prompt, colour=colour
                )
                name = f"passages/{number}-{voice.rule.label}.json"
                passages.append(_once(run, name, decode))
        names = list(experts.names)
        return _finish(run, {"mode": "text", "experts": names, "passages": passages})


def _speak(
    voice: Any, key: jax.Array, tokens: list[int], *, prompt: str, colour: bool
) -> dict[str, Any]:
    """Decodes one passage, showing it as it grows."""
    names = voice.experts.names
    if colour:
        sys.stdout.write(f"{_lm_text.painted_names(names)}  [{voice.rule.label}]\n")
        sys.stdout.write(f"\x1b[2m{_lm_text.printable(prompt)}\x1b[0m")
    painter = _lm_text.Painter(sys.stdout, colour=colour)
    passage = decode_passage(voice, key, tokens, prompt=prompt, painter=painter)
    print(flush=True)
    print(summary(passage, names), file=sys.stderr)
    return to_plain(passage)


def _chat(config: FuseLlmConfig, rules: Sequence[NamedRule]) -> None:
    """Talks under one rule; a run directory remembers the conversation."""
    if len(rules) > 1:
        raise ValueError(f"--chat takes one rule, not --rule={','.join(config.rule)}")
    experts = _open(config)
    params = join_params(experts)
    voice = make_voice(experts._replace(params=()), params, rules[0], config.sampling)
    with _open_run(config) as run:
        path = None if run is None else run.path / "messages.json"
        messages = read_json(path) if path is not None and path.exists() else []

        def on_turn(messages: list[dict[str, str]]) -> None:
            if path is not None:
                write_json(path, messages)

        converse(
            voice,
            jax.random.key(config.seed),
            messages,
            system=config.system,
            colour=_coloured(config),
            on_turn=on_turn,
        )


def _tasks(config: FuseLlmConfig, rules: Sequence[NamedRule]) -> dict[str, Any]:
    """Runs every task under every rule."""
    from experiments import _lm_tasks

    require(config, "run_dir")
    manager = _lm_tasks.task_manager(config.tasks, config.task.include_path)
    experts = _open(config)
    models = _lm_tasks.models_to_run(experts, rules, alone=config.task.alone)
    key = jax.random.key(config.seed)
    with _open_run(config) as run:
        table = {}
        for name, (params, model) in models.items():
            evaluate = functools.partial(
                _lm_tasks.run_tasks,
                params,
                model,
                experts.tokenizer,
                manager,
                config.tasks,
                config.task,
                key=key,
                special=config.sampling.special,
            )
            with run.stage(name):
                table[name] = run.once(f"tasks/{name}.json", evaluate)
        result = {"mode": "tasks", "experts": list(experts.names), "tasks": table}
        run.write_json("result.json", to_plain(result))
    print(markdown_table(*_lm_tasks.task_table(table)))
    return result


def _score(config: FuseLlmConfig, rules: Sequence[NamedRule]) -> dict[str, Any]:
    """Scores experts, other models and rules on held-out windows."""
    require(config, "run_dir")
    text = pathlib.Path(config.score) / "text"
    prepared = read_prepared(text)
    count = len(expand_runs(config.experts))
    every = _open(config, config.scoring.models)
    same = load_tokenizer(text / "tokenizer").vocab() == every.tokenizer.vocab()
    matrix = Matrix(every, count, rules, prepared, config.scoring, same_tokens=same)
    with _open_run(config) as run:
        files = {}
        for name in matrix.files:
            with run.stage(f"score {name}"):
                measure = functools.partial(matrix.measure, name)
                files[name] = run.once(f"scores/{name}.json", measure)
        drawn = None
        if config.scoring.drawn:
            with run.stage("draw"):
                draw = functools.partial(matrix.draw, jax.random.key(config.seed))
                drawn = run.once("scores/drawn.json", draw)
        result = to_plain(matrix.result(files, drawn, seed=config.seed))
        if result["passages"]:
            page = _lm_text.html_page(
                result["passages"], result["experts"], title="Mixed documents"
            )
            replace_file(run.path / "mixed.html", page)
        run.write_json("result.json", result)
    print("bits per byte of held-out text, 95 % intervals over documents")
    bits, apart = result["bits_per_byte"], result["difference"]["bits_per_byte"]
    print(markdown_table(*score_table(bits, apart, baseline=result["baseline"])))
    return result


def _once(run: Run | None, name: str, make: Callable[[], Any]) -> Any:
    return make() if run is None else run.once(name, make)


def _finish(run: Run | None, result: dict[str, Any]) -> dict[str, Any]:
    if run is not None:
        run.write_json("result.json", result)
        page = _lm_text.html_page(
            result["passages"], result["experts"], title="Fused text"
        )
        replace_file(run.path / "text.html", page)
        print(f"{run.path / 'text.html'}", file=sys.stderr)
    return result


def _coloured(config: FuseLlmConfig) -> bool:
    if config.colour == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return config.colour == "always"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(fuse, FuseLlmConfig, argv)


if __name__ == "__main__":
    sys.exit(main())
