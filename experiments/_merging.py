"""What a merge needs to know of its experts, whatever they model."""

from collections.abc import Callable
from typing import Any, NamedTuple

from emfuse_jax.base import Params
from emfuse_jax.merging import GramMemory
from experiments._run import Run


class GramPlan(NamedTuple):
    """How RegMean measures: known before anything long or large begins.

    Attributes:
        memory: what it holds.
        num_rows: per expert, the rows (tokens) that its widest layer is measured on.
        num_steps: progress is counted in these.
        merge: ``(on_step(done), weights=, shrinkage=, ridge=) -> params``.
    """

    memory: GramMemory
    num_rows: tuple[int, ...]
    num_steps: int
    merge: Callable[..., Params]


class Mergeable(NamedTuple):
    """Experts of one architecture.

    Attributes:
        names: as a person gave them.
        params: one tree per expert.
        family: ``dynamics`` or ``language``.
        unit: of ``measure`` and ``validate``.
        domains: what is measured on; none where no data were given.
        measure: ``params -> error by domain`` on held-out data; lower is better.
        validate: the same on the data that choices are made by.
        plan: for RegMean, None for other methods.
        save: writes the merged model into a run.
    """

    names: tuple[str, ...]
    params: list[Params]
    family: str
    unit: str
    domains: tuple[str, ...]
    measure: Callable[[Params], list[float]]
    validate: Callable[[Params], list[float]]
    plan: GramPlan | None
    save: Callable[[Run, Params], None]


def check_plan(experts: Mergeable, ridge: float, num_samples: int) -> None:
    """Refuses to measure Grams that would be singular.

    Raises:
        ValueError: naming the expert, and what would be enough.
    """
    plan: Any = experts.plan
    for name, rows in zip(experts.names, plan.num_rows, strict=True):
        if rows < plan.memory.widest and not ridge > 0.0:
            raise ValueError(
                f"{name} has {rows} rows to measure its widest layer on, which reads "
                f"{plan.memory.widest} inputs: the Gram would be singular. Give more "
                f"--data or raise --num_samples={num_samples}, or give --ridge=1e-4, which "
                "pulls towards the soup where nothing was measured"
            )


def describe_memory(memory: GramMemory, num_experts: int) -> str:
    """What RegMean is about to hold, in a sentence."""
    return (
        f"RegMean of {num_experts} experts: about {_size(memory.peak(num_experts))} beside "
        f"the parameters. Per expert {_size(memory.largest)} of Grams at a time "
        f"({_size(memory.total)} over all layers) and {_size(memory.carries)} of hidden "
        f"states; {_size(memory.solve)} to solve a layer of {memory.widest} inputs"
    )


def _size(num_bytes: int) -> str:
    size, unit = num_bytes / 1e6, "MB"
    if size >= 1000:
        size, unit = size / 1000, "GB"
    return f"{size:.3g} {unit}"
