"""What came of scoring: bits per byte and accuracy, by method and domain, with intervals.

Windows that share a document are one *cluster*: they are drawn together when intervals are
bootstrapped, so that a long document counts as one observation. A mixed window belongs to
the clusters of both its documents, which are then one. Several training seeds scored on the
same text are resampled too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments._lm import Window

MIXED = "mixed"
"""The file of windows whose halves are of two domains; not part of the mean over domains."""

Table = dict[str, dict[str, dict[str, Any]]]
"""``[domain][method]`` to ``{"mean": m, "interval": [low, high] | None}``."""


def cluster_labels(windows: Sequence[Window]) -> list[str]:
    """The cluster of each window, named by the first document in it."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for window in windows:
        first = root(window.documents[0])
        for other in window.documents[1:]:
            parent[root(other)] = first
    return [root(window.documents[0]) for window in windows]


def summarize_file(
    windows: Sequence[Window],
    log_probs: Mapping[str, np.ndarray],
    correct: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Sums by cluster of one file of windows, as JSON holds them.

    Args:
        windows: the file's.
        log_probs: of the continuations, by method, ``[window]``.
        correct: whether each method chose the right answer; None if it was not asked.
    """
    labels = cluster_labels(windows)
    names = list(dict.fromkeys(labels))
    rows = np.array([names.index(label) for label in labels])

    def total(values: Any) -> list[float]:
        return np.bincount(rows, np.asarray(values, float), len(names)).tolist()

    asked = [bool(window.distractors) for window in windows]
    found: dict[str, Any] = {
        "clusters": names,
        "windows": total(np.ones(len(windows))),
        "bytes": total([window.num_bytes for window in windows]),
        "log_prob": {name: total(value) for name, value in log_probs.items()},
    }
    if correct is not None and any(asked):
        found["asked"] = total(asked)
        found["correct"] = {name: total(value) for name, value in correct.items()}
    return found


def bits_per_byte_table(
    files: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    baseline: str = "",
    seed: int = 0,
    num_resamples: int = 2000,
) -> tuple[Table, dict[str, Any]]:
    """Bits per byte by domain, ``"mixed"`` if there, and ``"mean"`` over the domains.

    Args:
        files: by domain, what `summarize_file` gave: one per training seed.
        baseline: a method that the others are compared with.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Returns:
        The table; and by domain and method the difference to the baseline, both drawn
        together (empty without one).

    Raises:
        ValueError: if the baseline is no method, or seeds were scored on other text.
    """
    return _table(
        files, ("log_prob", "bytes"), -1.0 / np.log(2.0), baseline, seed, num_resamples
    )


def accuracy_table(
    files: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    baseline: str = "",
    seed: int = 0,
    num_resamples: int = 2000,
) -> tuple[Table, dict[str, Any]]:
    """As `bits_per_byte_table`, of the share of right answers; empty if none was asked."""
    asked = {
        name: parts
        for name, parts in files.items()
        if all("asked" in part for part in parts)
    }
    return _table(asked, ("correct", "asked"), 1.0, baseline, seed, num_resamples)


def mean_cells(
    values: Mapping[str, np.ndarray], *, seed: int = 0, num_resamples: int = 2000
) -> dict[str, dict[str, Any]]:
    """Means of independent observations with their intervals, all drawn together.

    Args:
        values: ``[observation]``, by name.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.
    """
    sums = np.array(list(values.values()))[None]
    rng = np.random.default_rng(seed)
    ones = np.ones(sums.shape[-1])
    return _cells(list(values), *_resample(sums, ones, rng, num_resamples))


def _table(
    files: Mapping[str, Sequence[Mapping[str, Any]]],
    keys: tuple[str, str],
    scale: float,
    baseline: str,
    seed: int,
    num_resamples: int,
) -> tuple[Table, dict[str, Any]]:
    if not files:
        return {}, {}
    of, per = keys
    methods = list(next(iter(files.values()))[0][of])
    if baseline and baseline not in methods:
        raise ValueError(f"baseline {baseline!r} is none of {', '.join(methods)}")
    rng = np.random.default_rng(seed)
    drawn = {}
    for domain, parts in files.items():
        if any(part["clusters"] != parts[0]["clusters"] for part in parts):
            raise ValueError(
                f"the seeds were scored on different documents of {domain!r}; train them "
                "with --text_from the first run"
            )
        sums = np.array([[part[of][method] for method in methods] for part in parts])
        ratios = _resample(sums, np.asarray(parts[0][per], float), rng, num_resamples)
        drawn[domain] = tuple(scale * ratio for ratio in ratios)
    single = [pair for domain, pair in drawn.items() if domain != MIXED]
    if len(single) > 1:
        mean = tuple(np.mean(part, axis=0) for part in zip(*single, strict=True))
        drawn["mean"] = mean
    differences = {}
    if baseline:
        at = methods.index(baseline)
        apart = {
            domain: (one - one[at], many - many[:, at : at + 1])
            for domain, (one, many) in drawn.items()
        }
        differences = {d: _cells(methods, *pair) for d, pair in apart.items()}
    return {d: _cells(methods, *pair) for d, pair in drawn.items()}, differences


def _resample(
    sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ratio ``[method]`` of all, and ``[resample, method]`` of clusters and seeds drawn
    with replacement; NaN where there is only one cluster.

    Args:
        sums: ``[seed, method, cluster]``.
        sizes: ``[cluster]``.
        rng: advanced.
        count: of resamples.
    """
    seeds, _, clusters = sums.shape
    whole = sums.mean(axis=0).sum(axis=-1) / sizes.sum()
    if clusters < 2:
        return whole, np.full((count, sums.shape[1]), np.nan)
    drawn = rng.multinomial(clusters, np.full(clusters, 1.0 / clusters), size=count)
    seeded = rng.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=count) / seeds
    total = np.einsum("rs,smc,rc->rm", seeded, sums, drawn, optimize=True)
    return whole, total / np.maximum(drawn @ sizes, 1e-9)[:, None]


def _cells(
    methods: Sequence[str], means: np.ndarray, drawn: np.ndarray
) -> dict[str, dict[str, Any]]:
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {
        name: {
            "mean": float(means[i]),
            "interval": None if np.isnan(low[i]) else [float(low[i]), float(high[i])],
        }
        for i, name in enumerate(methods)
    }
