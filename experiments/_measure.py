"""What every table of model error is made of: rows, predictions, errors, uncertainties."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import SpaceSpec, TransitionModel
from emfuse_jax.data import (
    Dataset,
    concatenate,
    gather_history,
    load_dataset,
    split_episodes,
)
from emfuse_jax.evaluation.fidelity import (
    delta_scale,
    k_step_error,
    open_loop,
    rms_error,
    row_error,
)
from experiments import _found, _names

HORIZONS = (1, 5, 10)


def require(config: Any, *names: str) -> None:
    """Refuses a config whose ``names`` were left empty.

    Raises:
        ValueError: naming the flag.
    """
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"--{name} is required; see --help")


class Domain(NamedTuple):
    """One data set, split by whole episodes."""

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset


def load_domains(
    sources: Sequence[str],
    *,
    min_length: int,
    test: float = 0.1,
    validation: float = 0.05,
) -> list[Domain]:
    """Reads data sets and splits each: the last episodes test, those before validate."""
    domains = []
    for source in sources:
        with _names.data_set(source):
            dataset = load_dataset(source, min_length=min_length)
        parts = split_episodes(dataset, test=test, validation=validation)
        domains.append(Domain(str(source), *parts))
    concatenate([domain.test for domain in domains])  # refuses sizes that differ
    return domains


def check_sizes(domains: Sequence[Domain], spec: SpaceSpec, model: str) -> None:
    """Refuses data sets of other sizes than those that ``model`` was trained on.

    Raises:
        ValueError: naming the data set and both sizes.
    """
    for domain in domains:
        sizes = domain.train.observation.shape[1], domain.train.action.shape[1]
        if sizes != tuple(spec):
            raise ValueError(
                f"{domain.name} has observation and action sizes {sizes}, {model} was "
                f"trained on {tuple(spec)}; give data of one environment"
            )


def data_behind(runs: Sequence[str]) -> tuple[str, ...]:
    """The data sets that runs of dynamics models and of fusions were made from, each
    once.

    Raises:
        FileNotFoundError: if one is no run directory.
        ValueError: if its config is not one of ours.
    """
    found: list[str] = []
    waiting, seen = list(runs), set()
    while waiting:
        run = waiting.pop(0)
        config = _found.run_config(run)
        with _found.reading(f"{run}/config.json"):
            data = _found.names_of(config["data"])
            experts = [] if data else _found.names_of(config["experts"])
        found += data
        waiting[:0] = [path for path in experts if path not in seen]
        seen.update(experts)
    return tuple(dict.fromkeys(found))


def pooled_unit(domains: Sequence[Domain]) -> jax.Array:
    """The unit of errors: pooled standard deviation of Δs over the training rows."""
    pooled = concatenate([domain.train for domain in domains])
    return delta_scale(
        jnp.asarray(pooled.observation), jnp.asarray(pooled.next_observation)
    )


def spaced_rows(
    dataset: Dataset, count: int, *, before: int, after: int = 0
) -> np.ndarray:
    """Evenly spaced rows with ``before`` steps of history and ``after`` steps to come.

    Raises:
        ValueError: if no episode is long enough.
    """
    usable = _usable_rows(dataset, before, after)
    if not len(usable):
        raise ValueError(
            f"no held-out episode has {before + 1 + after} steps; record longer episodes "
            "or hold out more of them"
        )
    chosen = np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int)
    return usable[chosen]


def _usable_rows(dataset: Dataset, before: int, after: int) -> np.ndarray:
    age = np.asarray(dataset.age)
    rows = np.arange(len(age))
    ahead = np.minimum(rows + after, len(age) - 1)
    return np.flatnonzero((age >= before) & (age[ahead] == age + after))


def check_held_out(domains: Sequence[Domain], lags: int) -> None:
    """Refuses data sets whose held-out episodes are all shorter than the window.

    Raises:
        ValueError: naming the data set and the length that is missing.
    """
    for domain in domains:
        for part in (domain.validation, domain.test):
            try:
                spaced_rows(part, 1, before=lags)
            except ValueError as error:
                raise ValueError(f"{domain.name}: {error}") from error


class OneStep(NamedTuple):
    """Held-out one-step errors of a model, one entry per row."""

    error: np.ndarray
    """Root mean square over the dimensions, in pooled units."""
    uncertainty: np.ndarray
    energy: np.ndarray
    rms: float


class Measured:
    """A model on held-out rows; compiled once however many data sets it is tried on."""

    def __init__(
        self, model: TransitionModel, params: Any, unit: jax.Array, *, lags: int
    ):
        self._params, self._unit, self._lags = params, unit, lags
        self._predict = jax.jit(model.predict)

        def several_steps(params: Any, key: Any, history: Any, actions: Any) -> Any:
            def step(key: jax.Array, history: Any) -> jax.Array:
                return model.predict(params, key, history).next_observation

            return open_loop(key, step, history, actions)

        self._open_loop = jax.jit(several_steps)

    def one_step(self, dataset: Dataset, count: int = 1500) -> OneStep:
        """Errors on evenly spaced rows with a full history."""
        rows = spaced_rows(dataset, count, before=self._lags)
        history = gather_history(dataset, rows, self._lags)
        predicted = self._predict(self._params, jax.random.key(0), history)
        target = jnp.asarray(dataset.next_observation[rows])
        error = row_error(predicted.next_observation, target, self._unit)
        return OneStep(
            np.asarray(error),
            np.asarray(predicted.uncertainty),
            np.asarray(predicted.energy),
            float(rms_error(predicted.next_observation, target, self._unit)),
        )

    def k_step(self, dataset: Dataset, count: int = 800) -> dict[str, float | None]:
        """Open-loop errors after 1, 5 and 10 steps with the true actions; None where no
        held-out episode is that long."""
        reached = [k for k in HORIZONS if len(_usable_rows(dataset, self._lags, k - 1))]
        if not reached:
            return dict.fromkeys(map(str, HORIZONS))
        horizon = max(reached)
        rows = spaced_rows(dataset, count, before=self._lags, after=horizon - 1)
        ahead = rows[None] + np.arange(horizon)[:, None]
        history = gather_history(dataset, rows, self._lags)
        predicted = self._open_loop(
            self._params, jax.random.key(0), history, jnp.asarray(dataset.action[ahead])
        )
        errors = k_step_error(
            predicted, jnp.asarray(dataset.next_observation[ahead]), self._unit
        )
        return {
            str(k): float(errors[k - 1]) if k in reached else None for k in HORIZONS
        }
