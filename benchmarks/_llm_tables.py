"""Tables of `llm_study`: means over training seeds, intervals over documents.

A bootstrap draws documents (all windows of one together), the same ones for every method
and seed, so that differences between methods are paired. Domains are drawn apart, and the
mean over domains is of their resamples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000


class Resamples:
    """Ratios of sums over texts, and how they vary when documents are drawn anew.

    Args:
        units: the document of each text.
        size: of each text: what the sums are divided by (bytes, or ones).
        seed: of the draws.
    """

    def __init__(self, units: Sequence[str], size: np.ndarray, seed: int):
        self.names, self._unit = np.unique(np.asarray(units), return_inverse=True)
        count = len(self.names)
        rng = np.random.default_rng(seed)
        # The first row is the sample itself.
        drawn = rng.multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)
        self._draws = np.concatenate([np.ones((1, count)), drawn])
        self._size = self._draws @ self._sum(size)

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._unit, weights=values, minlength=len(self.names))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """``Σ values / Σ size`` of the sample and of each resample ``[1 + resample]``."""
        return self._draws @ self._sum(values) / self._size


def interval(values: np.ndarray) -> dict[str, float]:
    """The sample's value, and where 95 % of the resamples lie."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"estimate": float(values[0]), "low": float(low), "high": float(high)}


def table(
    scores: Mapping[str, Mapping[str, np.ndarray]],
    resamples: Mapping[str, Resamples],
    columns: Sequence[str],
    *,
    against: Sequence[str] = (),
) -> dict[str, Any]:
    """Every method in every column, and the mean over ``columns``.

    Args:
        scores: ``[seed, text]`` by column and method.
        resamples: by column; may have more columns than the mean is over.
        columns: which the mean is over.
        against: methods to whom the differences are given.

    Returns:
        ``values[method][column]`` with an interval and the value of each seed, and
        ``difference_to[other][method][column]`` likewise. A method has a mean if it has
        all the columns that it is over.
    """
    methods = list(dict.fromkeys(name for own in scores.values() for name in own))
    drawn: dict[str, dict[str, np.ndarray]] = {}
    seeds: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        drawn[method], seeds[method] = {}, {}
        for column, resample in resamples.items():
            if method not in scores[column]:
                continue
            rows = scores[column][method]
            drawn[method][column] = resample(rows.mean(axis=0))
            seeds[method][column] = [float(resample(row)[0]) for row in rows]
        if set(columns) <= set(drawn[method]):
            mean = [drawn[method][column] for column in columns]
            drawn[method]["mean"] = np.mean(mean, axis=0)
            each = [seeds[method][column] for column in columns]
            seeds[method]["mean"] = np.mean(each, axis=0).tolist()
    values = {
        method: {
            column: {**interval(row), "seeds": seeds[method][column]}
            for column, row in drawn[method].items()
        }
        for method in methods
    }
    differences = {
        other: {
            method: {
                column: interval(row - drawn[other][column])
                for column, row in drawn[method].items()
                if column in drawn[other]
            }
            for method in methods
            if method != other
        }
        for other in against
        if other in drawn
    }
    return {"values": values, "difference_to": differences}


def text_table(
    values: Mapping[str, Any], columns: Sequence[str], *, descending: bool = False
) -> str:
    """A table for people: estimates, and half the width of their intervals. In the order
    of the means; methods without one come last."""
    width = max(len(name) for name in values) + 2

    def rank(name: str) -> tuple[bool, float]:
        cell = values[name].get("mean") or values[name][columns[-1]]
        estimate = cell["estimate"]
        return "mean" not in values[name], -estimate if descending else estimate

    order = sorted(values, key=rank)
    lines = [" " * width + "".join(f"{column[:14]:>15}" for column in columns)]
    for method in order:
        cells = ""
        for column in columns:
            cell = values[method].get(column)
            if cell is None:
                cells += f"{'':>15}"
                continue
            half = (cell["high"] - cell["low"]) / 2
            cells += f"{cell['estimate']:>8.3f} ±{half:.3f}"
        lines.append(f"{method:<{width}}{cells}")
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """A JSON value with five digits of every number with a fraction: results are text in a
    repository, and nothing here is known better."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
