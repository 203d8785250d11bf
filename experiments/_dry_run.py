"""``--dry_run``: what a training command would train, without training it.

The command runs as always up to its first fit: flags, data and models are read and
checked, and what is wrong with them is told. Run directories are opened in a temporary
folder. The fit then compiles its update, times a few of them and says what it found.
"""

import contextlib
import contextvars
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from experiments import _compiling

_SHOWN = 40  # arrays of one tree
_TIMED = 3  # calls
_SECONDS = 1.0  # per call, if an update is quick enough
_LONG = 3.0  # seconds of one update after which it is not repeated

_FOLDER: contextvars.ContextVar[pathlib.Path | None] = contextvars.ContextVar(
    "dry_run_folder", default=None
)


class Done(Exception):
    """What was asked for has been said."""


class Cost(NamedTuple):
    """Of one update, as compiled for this machine.

    Attributes:
        flops: XLA's count, which takes the body of a loop once; None where it has none.
        product_flops: of matrix products and convolutions, every turn of a scan counted.
        memory: bytes of the arguments, of what else is alive at the peak, and in all;
            empty where the device does not say.
        compile_seconds: that compiling took.
        seconds: per update, by the clock.
        timed: how ``seconds`` was found.
    """

    flops: float | None
    product_flops: float
    memory: dict[str, int]
    compile_seconds: float
    seconds: float
    timed: str


@contextlib.contextmanager
def asked(yes: bool) -> Iterator[None]:
    """Inside the body, `is_asked` says so and `place` gives folders that vanish."""
    if not yes:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="dry-run-") as folder:
        token = _FOLDER.set(pathlib.Path(folder))
        try:
            yield
        finally:
            _FOLDER.reset(token)


def is_asked() -> bool:
    """Whether this command runs dry."""
    return _FOLDER.get() is not None


def place() -> pathlib.Path:
    """A new folder for what a run writes while it is opened."""
    folder = _FOLDER.get()
    assert folder is not None
    return pathlib.Path(tempfile.mkdtemp(dir=folder))


def tell(
    title: str,
    key: jax.Array,
    learner: Any,
    state: Any,
    sample_batch: Callable[[jax.Array, Any], Any],
    num_steps: int,
    *,
    data: Any = None,
    done: int = 0,
    unit: str = "update",
    beside: Mapping[str, float] | None = None,
) -> None:
    """Prints shapes, parameter counts, FLOPs, memory and the expected time of a fit.

    Args:
        title: what is trained.
        key: as for `loops.fit`, one or one per seed.
        learner: as for `loops.fit`.
        state: as for `loops.fit`; consumed.
        sample_batch: as for `loops.fit`.
        num_steps: updates in all.
        data: as for `loops.fit`.
        done: of them, by an earlier start.
        unit: what one call of ``learner.update`` is.
        beside: seconds per update of what else has to be done, by name.
    """
    params = getattr(state, "params", state)
    batch = jax.eval_shape(sample_batch, key if not key.ndim else key[0], data)
    print(f"dry run of {title}: nothing is written or trained\n")
    seeds = f", {len(key)} seeds in front" if key.ndim else ""
    print(f"parameters: {count(params):,} numbers{seeds}\n{shapes(params)}")
    if shapes(batch) != shapes(data):
        print(f"data: {size(data)}\n{shapes(data)}")
    print(f"batch\n{shapes(batch)}\n")
    program = several_updates(key, learner, sample_batch)
    with _compiling.of(title):
        cost = measure(program, key, state, data)
    print(f"FLOPs per {unit}: {_flops(cost)}")
    print(f"memory: {_memory(cost)}")
    print(f"time: {_time(cost, num_steps - done, unit, beside or {})}")
    if done:
        print(f"done already: {done:,} of {num_steps:,}")


def several_updates(
    key: jax.Array, learner: Any, sample_batch: Callable[[jax.Array, Any], Any]
) -> Any:
    """A compiled ``(key, state, data, count) -> state`` of ``count`` updates: those of
    `loops.fit`, but as many as there is time for."""

    def updates(key: jax.Array, state: Any, data: Any, count: Any) -> Any:
        def one(step: Any, carry: Any) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, step))
            return learner.update(keys[1], carry, sample_batch(keys[0], data))[0]

        return jax.lax.fori_loop(0, count, one, state)

    if key.ndim:
        updates = jax.vmap(updates, in_axes=(0, 0, None, None))
    return jax.jit(updates, donate_argnums=1)


def measure(program: Any, key: jax.Array, state: Any, data: Any) -> Cost:
    """Compiles `several_updates` and times it."""
    one = jnp.asarray(1)
    traced = program.trace(key, state, data, one)
    lowered = traced.lower()
    started = time.monotonic()
    compiled = lowered.compile()
    compile_seconds = time.monotonic() - started

    def seconds(number: int) -> float:
        nonlocal state
        begin = time.monotonic()
        state = jax.block_until_ready(compiled(key, state, data, jnp.asarray(number)))
        return time.monotonic() - begin

    each, timed = seconds(1), "one call"
    if each < _LONG:
        number = max(1, min(1000, int(_SECONDS / seconds(1))))
        each = statistics.median(seconds(number) / number for _ in range(_TIMED))
        timed = f"the median of {_TIMED} calls of {number}"
    analysis = lowered.cost_analysis()
    return Cost(
        flops=analysis.get("flops") if isinstance(analysis, Mapping) else None,
        product_flops=product_flops(traced.jaxpr.jaxpr),
        memory=_bytes(compiled.memory_analysis()),
        compile_seconds=compile_seconds,
        seconds=each,
        timed=timed,
    )


def product_flops(jaxpr: Any) -> float:
    """Two per multiplication in matrix products and convolutions; the body of a scan as
    often as it runs, that of a while loop once, of branches the dearest.

    Example:
        >>> def chain(x):
        ...     return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]
        >>> product_flops(jax.make_jaxpr(chain)(jnp.ones((4, 4))).jaxpr)
        640.0
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, facts = equation.primitive.name, equation.params
        inner = [product_flops(body) for body in jaxprs_in_params(facts)]
        if name == "dot_general":
            (contracted, _), _ = facts["dimension_numbers"]
            left = equation.invars[0].aval.shape
            terms = [left[axis] for axis in contracted]
            total += 2.0 * _product(equation.outvars[0].aval.shape) * _product(terms)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[facts["dimension_numbers"].rhs_spec[0]]
            numbers = _product(kernel) / outputs
            total += 2.0 * _product(equation.outvars[0].aval.shape) * numbers
        elif name == "scan":
            total += facts["length"] * sum(inner)
        elif name == "cond":
            total += max(inner, default=0.0)
        else:
            total += sum(inner)
    return total


def count(tree: Any) -> int:
    """Numbers in a tree."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


def shapes(tree: Any) -> str:
    """One line per array, with its name in the tree."""
    like = jax.eval_shape(lambda tree: tree, tree)
    leaves = jax.tree_util.tree_leaves_with_path(like)
    lines = []
    for path, leaf in leaves[:_SHOWN]:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "-"
        lines.append(f"  {name}: {leaf.dtype}{list(leaf.shape)}")
    if len(leaves) > _SHOWN:
        lines.append(f"  … and {len(leaves) - _SHOWN} more")
    return "\n".join(lines)


def size(tree: Any) -> str:
    """Of a tree's arrays."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda tree: tree, tree))
    return _as_bytes(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))


def _bytes(analysis: Any) -> dict[str, int]:
    if analysis is None:
        return {}
    arguments = analysis.argument_size_in_bytes
    rest = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    rest += analysis.temp_size_in_bytes
    return {"arguments": arguments, "temporary": rest, "all": arguments + rest}


def _flops(cost: Cost) -> str:
    counted = "unknown" if cost.flops is None else _short(cost.flops).strip()
    products = _short(cost.product_flops).strip()
    return (
        f"{counted} by XLA, which counts the body of a loop once; {products} in matrix "
        "products, every turn of a scan counted"
    )


def _memory(cost: Cost) -> str:
    if not cost.memory:
        return "this device does not say"
    told = {name: _as_bytes(number) for name, number in cost.memory.items()}
    return (
        f"{told['all']} at the most: {told['arguments']} of state and data, "
        f"{told['temporary']} of intermediate results"
    )


def _time(cost: Cost, left: int, unit: str, beside: Mapping[str, float]) -> str:
    parts = {"": cost.seconds, **beside}
    each = " + ".join(f"{_as_time(s)} {name}".strip() for name, s in parts.items())
    total = _as_time(left * sum(parts.values()))
    return (
        f"{each} per {unit} ({cost.timed}, on {jax.devices()[0].device_kind}); {total} "
        f"for {left:,}, if that holds. Compiling ({_as_time(cost.compile_seconds)} now), "
        "evaluations and checkpoints come on top"
    )


def _as_bytes(number: float) -> str:
    return f"{_short(number)}B"


def _short(number: float) -> str:
    """With three digits and a prefix of thousands."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} T"


def _as_time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _product(numbers: Any) -> float:
    total = 1.0
    for number in numbers:
        total *= number
    return total
