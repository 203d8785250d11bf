"""What all pictures share: figures without a display, palette, series, saving."""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

PathLike: TypeAlias = str | os.PathLike[str]

# Okabe & Ito, Color Universal Design, 2008.
COLOURS = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}
_MARKERS = "osD^vP*X"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "savefig.dpi": 150,
}


def styled(plot: Callable[..., pathlib.Path]) -> Callable[..., pathlib.Path]:
    """Draws with the house's settings, and leaves the caller's as they were."""

    @functools.wraps(plot)
    def drawn(*args: Any, **kwargs: Any) -> pathlib.Path:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return plot(*args, **kwargs)

    return drawn


def axes_grid(
    count: int,
    *,
    size: tuple[float, float],
    columns: int = 1,
    share: bool = False,
) -> tuple[Any, list[Any]]:
    """A figure (no pyplot, so no display and no global state) with ``count`` axes.

    Args:
        count: axes.
        size: of one of them, in inches.
        columns: side by side.
        share: one scale for all.

    Raises:
        ValueError: if there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if count < 1:
        raise ValueError("nothing to draw; expected at least one entry in the data")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for axes in list(grid.flat)[count:]:
        axes.remove()
    used = list(grid.flat)[:count]
    for axes in used:
        # With shared axes only the outer ones have numbers; an emptied place has none.
        axes.xaxis.set_tick_params(labelbottom=True)
    return figure, used


def si_prefix(value: float, _: Any = None) -> str:
    """250000 as 250k; also a formatter of ticks.

    Example:
        >>> si_prefix(250_000), si_prefix(41_234), si_prefix(0.5), si_prefix(3.2e9)
        ('250k', '41.2k', '0.5', '3.2G')
    """
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def by_name(
    curves: Mapping[str, Any],
) -> Iterator[tuple[dict[str, Any], tuple[str, Any]]]:
    """Each curve with its own colour and marker."""
    colours = list(COLOURS.values())[:-1]  # yellow lines vanish on white
    for index, item in enumerate(curves.items()):
        style = {"color": colours[index % 7], "marker": _MARKERS[index % 8]}
        yield style, item


def series(
    name: str, data: Mapping[str, Any], x: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """``x``, value, low and high as float arrays; None becomes NaN.

    Raises:
        ValueError: if one is missing or their lengths differ.
    """
    needed = [x, "value"] + (["low", "high"] if "low" in data or "high" in data else [])
    missing = [key for key in needed if key not in data]
    if missing:
        raise ValueError(f"series {name!r} has no {missing}; it has {list(data)}")
    found = {key: np.asarray(data[key], float) for key in needed}
    lengths = {key: value.size for key, value in found.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"series {name!r} has lengths {lengths}; expected one length")
    return found[x], found["value"], found.get("low"), found.get("high")


def band(
    axes: Any,
    x: np.ndarray,
    value: np.ndarray,
    low: np.ndarray | None,
    high: np.ndarray | None,
    *,
    label: str,
    color: str,
    marker: str,
) -> None:
    """A line with its interval; markers only where they do not run together."""
    every = max(1, x.size // 12)
    axes.plot(x, value, color=color, marker=marker, markevery=every, label=label)
    if low is not None:
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def save(figure: Any, path: PathLike) -> pathlib.Path:
    """Writes the PNG whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png")
    os.replace(part, path)
    return path
