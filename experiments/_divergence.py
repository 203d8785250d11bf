"""Training that has diverged: found at a chunk's end, told, and perhaps tried again.

A number that is not finite, or a metric past its limit below, ends the run before anything
of it is saved: the last checkpoint is a good one. With ``--on_divergence=rollback`` the
command goes back to it with half of every learning rate. No loss is ever patched.

The limits are far beyond what healthy training shows (critics of MuJoCo's returns stay
below 1e4, energies are told apart at a gap of tens), and far below where float32 ends.
"""

import contextlib
import contextvars
import dataclasses
import fnmatch
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts

EXIT_STATUS = 3
ROLLBACK_FILE = "rollbacks.json"
FACTOR = 0.5  # a power of two, so that a rate can be scaled back exactly
MAX_ROLLBACKS = 5


class Rule(NamedTuple):
    """A metric has diverged where its size exceeds a limit.

    Attributes:
        pattern: of the metric's name, as in a shell.
        limit: on the absolute value.
        meaning: what has happened then.
    """

    pattern: str
    limit: float
    meaning: str


RULES = (
    Rule("*gap*", 1e4, "the energy gap runs away"),
    Rule("energy*", 1e6, "the energies run away"),
    Rule("q_*", 1e6, "Q explodes"),
    Rule("value_mean", 1e6, "the values explode"),
    Rule("temperature", 1e4, "the temperature runs away"),
    Rule("*loss*", 1e12, "the loss runs away"),
    Rule("gradient_norm", 1e12, "the gradients explode"),
)
"""The first rule whose pattern fits holds; every other metric must be finite."""


class Finding(NamedTuple):
    """What has diverged."""

    metric: str
    value: float
    limit: float
    meaning: str

    def __str__(self) -> str:
        bound = "" if math.isinf(self.limit) else f" (limit {self.limit:g})"
        return f"{self.metric}={self.value:g}{bound}: {self.meaning}"


class DivergedError(Exception):
    """The run has diverged, and the last checkpoint is a good one.

    Args:
        step: at which it was seen.
        finding: what has diverged.
        checkpoint: the last good one, or None where none was saved yet.
    """

    def __init__(
        self, step: int, finding: Finding, checkpoint: pathlib.Path | None
    ) -> None:
        self.step, self.finding, self.checkpoint = step, finding, checkpoint
        good = checkpoint or "none, it would begin anew"
        super().__init__(f"diverged at step {step}, {finding}; last good one: {good}")


class RescaleError(Exception):
    """The run goes on with learning rates of another scale than it was opened with."""

    def __init__(self, scale: float) -> None:
        super().__init__(f"learning rates are to be scaled by {scale:g}")
        self.scale = scale


class Attempt:
    """One call of a command's main function; the first run that it opens keeps the record.

    Attributes:
        scale: of the learning rates in the config that it was given.
        mode: what ``--on_divergence`` says.
        root: the directory of that run.
    """

    def __init__(self, scale: float, mode: str) -> None:
        self.scale, self.mode = scale, mode
        self.root: pathlib.Path | None = None


_ATTEMPT: contextvars.ContextVar[Attempt | None] = contextvars.ContextVar(
    "attempt", default=None
)


def find(metrics: Mapping[str, Any], params: Any = None) -> Finding | None:
    """The first metric past its limit, or the first parameter that is not finite.

    Args:
        metrics: scalars or arrays ``[seed]``, averaged over a chunk.
        params: checked as well, since a mean shows the last step's NaN a chunk late.
    """
    for name, value in metrics.items():
        rule = next((r for r in RULES if fnmatch.fnmatch(name, r.pattern)), None)
        limit = math.inf if rule is None else rule.limit
        for number in np.ravel(np.asarray(value, np.float64)):
            if not math.isfinite(number):
                return Finding(name, float(number), limit, "not a finite number")
            if rule is not None and abs(number) > limit:
                return Finding(name, float(number), limit, rule.meaning)
    for path, finite in jax.tree_util.tree_leaves_with_path(
        jax.device_get(_all_finite(_inexact(params)))
    ):
        if not finite:
            name = "params" + jax.tree_util.keystr(path)
            return Finding(name, math.nan, math.inf, "not finite numbers")
    return None


@contextlib.contextmanager
def attempt(scale: float, mode: str = "stop") -> Iterator[Attempt]:
    """Inside the body, runs are opened by configs whose learning rates are so scaled."""
    made = Attempt(scale, mode)
    token = _ATTEMPT.set(made)
    try:
        yield made
    finally:
        _ATTEMPT.reset(token)


def mode() -> str:
    """What ``--on_divergence`` says, for commands that start others."""
    made = _ATTEMPT.get()
    return "stop" if made is None else made.mode


def as_asked(config: Any) -> Any:
    """A config's JSON with the learning rates that the user asked for."""
    made = _ATTEMPT.get()
    return config if made is None else rescale(config, 1.0 / made.scale)


def check_scale(path: pathlib.Path) -> None:
    """To be called when a run is opened.

    Raises:
        RescaleError: if the run was rolled back and goes on at another scale.
    """
    made = _ATTEMPT.get()
    if made is not None and made.root is not None:
        return  # a run inside the first one
    scale = _recorded_scale(path)
    if scale != (1.0 if made is None else made.scale):
        raise RescaleError(scale)
    if made is not None:
        made.root = path


def roll_back(made: Attempt, config: Any, error: DivergedError) -> float:
    """Records that a run goes back to its last good checkpoint; returns the next scale.

    Raises:
        DivergedError: the same, if there is nothing to be made smaller, or it was made so
            often enough.
    """
    if made.root is None or rescale(config, FACTOR) == config:
        raise error
    past = _records(made.root)
    if len(past) >= MAX_ROLLBACKS:
        raise error
    scale = made.scale * FACTOR
    checkpoint = None if error.checkpoint is None else str(error.checkpoint)
    entry = {"step": error.step, **error.finding._asdict(), "checkpoint": checkpoint}
    record = [*past, {**entry, "learning_rate_scale": scale}]
    artifacts.write_json(made.root / ROLLBACK_FILE, record)
    return scale


def rescale(config: Any, scale: float) -> Any:
    """A config, or its JSON, with every learning rate multiplied by ``scale``.

    Example:
        >>> rescale({"sac": {"actor_learning_rate": 1e-3, "tau": 0.1}}, 0.5)
        {'sac': {'actor_learning_rate': 0.0005, 'tau': 0.1}}
    """
    if scale == 1.0:
        return config

    def scaled(name: str, value: Any) -> Any:
        if name.endswith("learning_rate") and isinstance(value, float):
            return value * scale
        return rescale(value, scale)

    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        names = [field.name for field in dataclasses.fields(config) if field.init]
        changed = {name: scaled(name, getattr(config, name)) for name in names}
        return dataclasses.replace(config, **changed)
    if isinstance(config, Mapping):
        return {name: scaled(name, value) for name, value in config.items()}
    return config


def _recorded_scale(path: pathlib.Path) -> float:
    records = _records(path)
    return records[-1]["learning_rate_scale"] if records else 1.0


def _records(path: pathlib.Path) -> list[dict[str, Any]]:
    file = path / ROLLBACK_FILE
    return artifacts.read_json(file) if file.exists() else []


def _inexact(params: Any) -> Any:
    """Leaves that can be NaN; None in the place of the others."""
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else None, params
    )


@jax.jit
def _all_finite(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), params)
