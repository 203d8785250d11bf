"""How the benchmarks measure: what every script here shares.

Contenders of one comparison run in one process and take turns, round after round, so that
a change of the machine's load meets all of them. Compilation and the first call are timed
apart. Rates are per second of this process's own CPU time: on an idle machine with one
thread that is the wall clock, on a busy one it leaves out the time given to others (but
not what they do to the caches, so a quiet machine is still needed for a number to quote).
"""

import contextlib
import os
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emfuse_jax import artifacts

MIN_REPEATS = 5


class Timing(NamedTuple):
    """Seconds of one contender."""

    compile: float | None
    first: float
    wall: list[float]
    cpu: list[float]

    def summary(self, units: float) -> dict[str, Any]:
        """Median and spread; ``units`` is the work of one call, for the rate."""
        rates = sorted(units / seconds for seconds in self.cpu)
        return {
            "compile_seconds": self.compile,
            "first_call_seconds": self.first,
            "wall_seconds": spread(self.wall),
            "cpu_seconds": spread(self.cpu),
            "rate_per_cpu_second": spread(rates),
            "repeats": len(self.cpu),
        }


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable, float]:
    """``jit``, lowered and compiled for these arguments, and the seconds that took."""
    start = time.perf_counter()
    executable = jax.jit(function).lower(*args).compile()
    return lambda: executable(*args), time.perf_counter() - start


def measure(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    compile_seconds: Mapping[str, float] | None = None,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Times contenders in turns.

    Args:
        calls: what each contender does in one call, compiled already.
        repeats: rounds after the warm-up, which is the first call and one more.
        compile_seconds: of those contenders that have any.
        pause: seconds before each timed call, in which threads that the one before has
            left waiting busily fall asleep.
    """
    first, wall, cpu = {}, {name: [] for name in calls}, {name: [] for name in calls}
    for name, call in calls.items():
        first[name] = _seconds(call)[0]
        _seconds(call)
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(pause)
            seconds, own = _seconds(call)
            wall[name].append(seconds)
            cpu[name].append(own)
    compile_seconds = compile_seconds or {}
    return {
        name: Timing(compile_seconds.get(name), first[name], wall[name], cpu[name])
        for name in calls
    }


def _seconds(call: Callable[[], Any]) -> tuple[float, float]:
    start, own = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - start, time.process_time() - own


def ratio(timings: Mapping[str, Timing], name: str, peer: str) -> dict[str, float]:
    """How many times faster ``name`` is than ``peer``, round by round."""
    pairs = zip(timings[peer].cpu, timings[name].cpu, strict=True)
    return spread([theirs / ours for theirs, ours in pairs])


def gemm_rates(
    shapes: list[tuple[int, int]], *, repeats: int, calls: int = 50
) -> dict[str, Any]:
    """GFLOP per CPU-second of float32 matrix products in jax, and in torch if there is one.

    A timed call is a chain of products, each one's output the next one's input, as in a
    deep network: single calls would mostly time the dispatch and fresh pages.

    Args:
        shapes: ``(rows, width)`` of the products ``[rows, width] @ [width, width]``.
        repeats: rounds.
        calls: products per chain.

    Returns:
        By library: each shape's median, min and max, and the ``best`` median.
    """
    result: dict[str, Any] = {}
    for rows, width in shapes:
        contenders = {"jax": _jax_gemm(rows, width, calls)}
        with contextlib.suppress(ImportError):
            contenders["torch"] = _torch_gemm(rows, width, calls)
        timings = measure(contenders, repeats=repeats)
        work = 2e-9 * rows * width * width * calls
        for name, timing in timings.items():
            rates = spread([work / seconds for seconds in timing.cpu])
            result.setdefault(name, {})[f"{rows}x{width}x{width}"] = rates
    for rates in result.values():
        rates["best"] = max(shape["median"] for shape in rates.values())
    return result


def _jax_gemm(rows: int, width: int, calls: int) -> Callable[[], Any]:
    def chain(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, calls, lambda _, x: x @ right, left)

    left, right = jnp.ones((rows, width)), jnp.full((width, width), 1.0 / width)
    return compiled(chain, left, right)[0]


def _torch_gemm(rows: int, width: int, calls: int) -> Callable[[], Any]:
    import torch

    left, right = torch.ones((rows, width)), torch.full((width, width), 1.0 / width)
    buffers = torch.empty_like(left), torch.empty_like(left)

    def chain() -> None:
        current = left
        for call in range(calls):
            current = torch.mm(current, right, out=buffers[call % 2])

    return chain


@contextlib.contextmanager
def quiet_machine(threads: int) -> Iterator[dict[str, Any]]:
    """Pins this process to ``threads`` cores and compiles afresh; undone at the end.

    Enter it before the first use of a device: XLA's threads inherit the cores of the
    thread that starts them, and keep them.

    Yields:
        What the result should say of the machine.
    """
    facts: dict[str, Any] = {
        "threads": threads,
        "load_average_before": os.getloadavg()[0],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    if cores:
        os.sched_setaffinity(0, sorted(cores)[-threads:])
        facts["pinned_to"] = sorted(os.sched_getaffinity(0))
    try:
        with contextlib.suppress(ImportError):
            import torch

            torch.set_num_threads(threads)
            facts["torch"] = torch.__version__
            facts["torch_cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        yield facts
    finally:
        facts["load_average_after"] = os.getloadavg()[0]
        jax.config.update("jax_enable_compilation_cache", cached)
        if cores:
            os.sched_setaffinity(0, cores)


def portable(value: Any) -> Any:
    """A JSON value with file names in place of paths: results travel, folders do not."""
    if isinstance(value, Mapping):
        return {portable(key): portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(?<![\w.])/[^\s,=]*/", "", value)
    return value


def write(
    output: str, question: str, config: Any, machine: dict[str, Any], results: Any
) -> dict[str, Any]:
    """Writes a benchmark's JSON, with what is needed to believe it, and returns it."""
    document = {
        "question": question,
        "results": results,
        "config": artifacts.to_json(config),
        "machine": {**machine, "platform": platform.platform()},
        "provenance": artifacts.provenance(),
    }
    if output:
        path = pathlib.Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(path, portable(document))
    return document
