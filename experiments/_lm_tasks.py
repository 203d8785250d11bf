"""lm-evaluation-harness at the command line: tasks by name, from the harness or a folder."""

import dataclasses
import difflib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from emfuse_jax.base import LanguageModel
from emfuse_jax.evaluation.harness import harness_model
from emfuse_jax.llm.rules import uniform
from experiments._lm_experts import Experts, fuse_rule, join_params, select_experts
from experiments._lm_rules import NamedRule
from experiments._tables import Column


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Settings of ``--tasks``.

    Attributes:
        include_path: folder of YAML files with tasks of your own; they need no network.
        limit: documents per task; none is all.
        num_fewshot: examples before each question; none is the task's own number.
        batch_size: rows per call.
        chat: apply the chat template.
        alone: also evaluate every expert alone.
    """

    include_path: str = ""
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 16
    chat: bool = False
    alone: bool = False


def task_manager(tasks: Sequence[str], include_path: str) -> Any:
    """Finds the tasks; the harness' own are only looked through if a folder has not all.

    Args:
        tasks: names of tasks, groups and tags.
        include_path: a folder of YAML files, or "".

    Raises:
        FileNotFoundError: if the folder does not exist.
        ImportError: without lm_eval.
        ValueError: for a task that nobody has; near names are listed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "tasks need lm-evaluation-harness: pip install emfuse_jax[llm_eval]"
        ) from error
    if include_path and not pathlib.Path(include_path).is_dir():
        raise FileNotFoundError(f"--task.include_path={include_path} is no folder")
    path = include_path or None
    manager = TaskManager(include_path=path, include_defaults=False) if path else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path, include_defaults=True)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=5, cutoff=0.5)
            raise ValueError(
                f"no task {task!r}; near: {', '.join(near) or 'none'}. Local tasks are "
                "YAML files below --task.include_path"
            )
    return manager


def models_to_run(
    experts: Experts, rules: Sequence[NamedRule], *, alone: bool
) -> dict[str, tuple[Any, LanguageModel]]:
    """Params and model by name: each expert alone, if wanted, and each rule."""
    models = {}
    if alone:
        for index, name in enumerate(experts.names):
            one = select_experts(experts, slice(index, index + 1))
            models[name] = (join_params(one), fuse_rule(one, uniform()))
    params = join_params(experts)
    return models | {
        rule.label: (params, fuse_rule(experts, rule.rule)) for rule in rules
    }


def run_tasks(
    params: Any,
    model: LanguageModel,
    tokenizer: Any,
    manager: Any,
    tasks: Sequence[str],
    options: TaskOptions,
    *,
    key: jax.Array,
    special: bool,
) -> dict[str, dict[str, Any]]:
    """Metrics by task, ``{"mean": m, "stderr": s}`` each, as the harness computes them.

    Args:
        params: the model's.
        model: one or many fused.
        tokenizer: of its vocabulary.
        manager: from `task_manager`.
        tasks: their names.
        options: how they are run.
        key: of tasks that sample.
        special: put before a context what the tokenizer puts before a text.
    """
    import lm_eval

    evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its arguments
    language_model = harness_model(
        params,
        model,
        tokenizer,
        key=key,
        batch_size=options.batch_size,
        special=special,
    )
    found = evaluate(
        language_model,
        tasks=list(tasks),
        task_manager=manager,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.chat,
        log_samples=False,
        bootstrap_iters=1000,
        torch_random_seed=None,  # there may be no torch
    )
    return {task: _metrics(row) for task, row in found["results"].items()}


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    """``acc,none`` and ``acc_stderr,none`` as one entry ``acc``."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name, comma, form = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{name}_stderr,{form}")
        error = float(error) if isinstance(error, int | float) else None
        label = name if form == "none" else f"{name} ({form})"
        found[label] = {"mean": float(value), "stderr": error}
    return found


def task_table(
    table: Mapping[str, Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[Column]]:
    """A row per model, a column per task and metric; intervals are 1.96 standard errors."""
    rows, columns = [], {}
    for name, tasks in table.items():
        row: dict[str, Any] = {"model": name}
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                key, error = f"{task} {metric}", value["stderr"]
                around = None
                if error is not None:
                    far = 1.96 * error
                    around = [value["mean"] - far, value["mean"] + far]
                row[key] = {"mean": value["mean"], "interval": around}
                columns[key] = Column(key, key, 3)
        rows.append(row)
    return rows, [Column("model", "model"), *columns.values()]
