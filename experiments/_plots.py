"""Pictures of results: plain dicts, as read from JSON, in; one PNG out.

Every function takes ``(data, path)``, makes the folder, and returns the path. ``None`` and
NaN are gaps. A *series* is ``{"value": […], "low": […], "high": […]}`` with ``low`` and
``high`` optional. Colours are Okabe and Ito's, which colour-blind readers can tell apart,
and every line also has its own marker.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments._figure import (
    COLOURS,
    PathLike,
    axes_grid,
    band,
    by_name,
    save,
    series,
    si_prefix,
    styled,
)

_DENSE = 3000
"""More points than this are drawn as a density."""


@styled
def learning_curves(
    data: Mapping[str, Any],
    path: PathLike,
    *,
    x_label: str = "updates",
    y_label: str = "D4RL-normalised return",
) -> pathlib.Path:
    """Lines with intervals over training, one per method.

    Args:
        data: ``{"curves": {method: series with "step"}, "references": {name: level}}``;
            ``references`` (optional) are dashed horizontal lines.
        path: of the PNG.
        x_label: what a step is.
        y_label: what is measured, with its unit.
    """
    figure, (axes,) = axes_grid(1, size=(6.4, 4.0))
    for style, (name, curve) in by_name(data["curves"]):
        band(axes, *series(name, curve, "step"), label=name, **style)
    for index, (name, level) in enumerate(data.get("references", {}).items()):
        style = {"color": "0.35", "linestyle": ("--", ":", "-.")[index % 3]}
        axes.axhline(level, linewidth=1.2, label=name, **style)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_formatter(si_prefix)
    axes.legend()
    return save(figure, path)


@styled
def model_error_bars(
    data: Mapping[str, Any],
    path: PathLike,
    *,
    y_label: str = "one-step RMS error (std of Δs)",
) -> pathlib.Path:
    """Grouped bars: for each test domain the error of each expert and of the fusion.

    Args:
        data: ``{"domains": […], "models": {model: series over the domains}}``; models whose
            name starts with "expert" are one family of blues, the others stand out.
        path: of the PNG.
        y_label: what is measured, with its unit.
    """
    domains, models = list(data["domains"]), data["models"]
    width = max(6.4, 0.28 * len(domains) * (len(models) + 1) + 1.5)
    figure, (axes,) = axes_grid(1, size=(width, 4.0))
    _grouped_bars(axes, domains, models)
    axes.set(xlabel="test domain", ylabel=y_label)
    figure.legend(loc="outside upper center", ncols=min(len(models), 4))
    return save(figure, path)


@styled
def k_step_errors(
    data: Mapping[str, Any],
    path: PathLike,
    *,
    y_label: str = "open-loop RMS error (std of Δs)",
) -> pathlib.Path:
    """Error against the number of steps predicted ahead, on logarithmic axes.

    Args:
        data: ``{"models": {model: series with "k"}}``.
        path: of the PNG.
        y_label: what is measured, with its unit.
    """
    from matplotlib import ticker

    figure, (axes,) = axes_grid(1, size=(6.4, 4.0))
    steps = set()
    for style, (name, curve) in by_name(data["models"]):
        k, *values = series(name, curve, "k")
        steps |= {int(step) for step in k}
        band(axes, k, *values, label=name, **style)
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="steps ahead, with the true actions", ylabel=y_label)
    axes.set_xticks(sorted(steps), labels=[str(step) for step in sorted(steps)])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    _plain_decimals(axes.yaxis)
    axes.legend()
    return save(figure, path)


@styled
def uncertainty_against_error(
    data: Mapping[str, Any], path: PathLike, *, columns: int | None = None
) -> pathlib.Path:
    """The model's uncertainty against its true error, a panel per model, both log.

    Args:
        data: ``{"panels": {title: {"uncertainty": […], "error": […], "spearman": ρ,
            "outside": […]}}}``; ``spearman`` and ``outside`` (0 or 1 per row: not from the
            model's own domain) are optional. Values that are not positive are left out,
            and counted in the panel.
        path: of the PNG.
        columns: panels side by side; about as many as below each other by default.
    """
    panels = data["panels"]
    columns = columns or (len(panels) if len(panels) < 4 else -(-len(panels) // 2))
    figure, grid = axes_grid(len(panels), size=(3.6, 3.4), columns=columns, share=True)
    for axes, (title, panel) in zip(grid, panels.items(), strict=False):
        x = np.asarray(panel["uncertainty"], float)
        y = np.asarray(panel["error"], float)
        if x.shape != y.shape:
            raise ValueError(
                f"panel {title!r} has {x.size} uncertainties and {y.size} errors; expected "
                "one of each per row"
            )
        shown = (x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)
        axes.set(xscale="log", yscale="log")
        outside = np.asarray(panel.get("outside", np.zeros(x.shape)), bool)
        _cloud(axes, x[shown], y[shown], outside[shown] if outside.any() else None)
        if (hidden := int((~shown).sum())) > 0:
            axes.annotate(
                f"{hidden} rows not positive",
                (0.97, 0.03),
                xycoords="axes fraction",
                ha="right",
                fontsize=8,
            )
        rank = panel.get("spearman")
        label = "" if rank is None else f"\nSpearman {rank:.2f}"
        axes.set_title(f"{title}{label}")
        axes.set_xlabel("uncertainty u")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("true error (std of Δs)")
    for axis in (grid[0].xaxis, grid[0].yaxis):
        _plain_decimals(axis)
    return save(figure, path)


@styled
def energy_landscapes(
    data: Mapping[str, Any], path: PathLike, *, columns: int = 4, levels: int = 12
) -> pathlib.Path:
    """Contours of a slice through each expert's energy, and the fused one's, beside it.

    Energies are shown above their own minimum, on one scale for all panels: the constants
    of two energies cannot be compared, their shapes can.

    Args:
        data: ``{"x": […], "y": […], "energies": {title: [y][x]}, "x_label": …, "y_label":
            …, "truth": [x, y], "samples": {title: [[x, …], [y, …]]}}``; ``truth`` and
            ``samples`` (optional) are marked, as is each minimum.
        path: of the PNG.
        columns: panels side by side.
        levels: contours.
    """
    x, y = np.asarray(data["x"], float), np.asarray(data["y"], float)
    heights = {
        title: _above_minimum(title, energy, (y.size, x.size))
        for title, energy in data["energies"].items()
    }
    # The flattest panel's upper part decides where contours end: walls would take all.
    top = min(float(np.nanquantile(height, 0.8)) for height in heights.values())
    bounds = _round_levels(top, levels)
    figure, grid = axes_grid(len(heights), size=(3.0, 3.1), columns=columns, share=True)
    for axes, (title, height) in zip(grid, heights.items(), strict=False):
        filled = axes.contourf(x, y, height, bounds, cmap="viridis_r", extend="max")
        axes.contour(x, y, height, bounds[1::2], colors="white", linewidths=0.4)
        row, column = np.unravel_index(np.nanargmin(height), height.shape)
        marker = {"color": COLOURS["vermillion"], "linestyle": "none", "clip_on": False}
        if title in data.get("samples", {}):
            dots = {"color": "white", "markeredgecolor": "black", "linestyle": "none"}
            dots |= {"markersize": 3, "markeredgewidth": 0.4}
            axes.plot(*data["samples"][title], "o", label="drawn", **dots)
        axes.plot(x[column], y[row], "o", label="minimum", markersize=6, **marker)
        if data.get("truth") is not None:
            edge = {"markeredgecolor": "white", "markersize": 12}
            axes.plot(*data["truth"], "*", label="true next state", **edge, **marker)
        axes.set(title=title, xlabel=data.get("x_label", "x"))
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(data.get("y_label", "y"))
    figure.colorbar(filled, ax=grid, label="E − min E (nats)", pad=0.02)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return save(figure, path)


@styled
def bench_bars(data: Mapping[str, Any], path: PathLike) -> pathlib.Path:
    """Bars of measured speeds, a panel per case: each has its own scale.

    Args:
        data: ``{"unit": "chains × steps / s", "cases": {case: {name: {"median": …,
            "low": …, "high": …}}}}``; the ratio to the first name is written on each bar.
        path: of the PNG.
    """
    cases = data["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case))
    colours = dict(zip(names, COLOURS.values(), strict=False))
    rows = max(len(case) for case in cases.values())
    figure, grid = axes_grid(
        len(cases), size=(4.2, 1.0 + 0.42 * rows), columns=min(3, len(cases))
    )
    for axes, (title, case) in zip(grid, cases.items(), strict=False):
        values = [float(entry["median"]) for entry in case.values()]
        ends = [
            (v - float(e.get("low", v)), float(e.get("high", v)) - v)
            for v, e in zip(values, case.values(), strict=True)
        ]
        places = np.arange(len(case))[::-1]
        axes.barh(
            places,
            values,
            xerr=np.transpose(ends),
            color=[colours[name] for name in case],
            error_kw={"elinewidth": 1.0, "capsize": 3},
        )
        reach = max(v + e[1] for v, e in zip(values, ends, strict=True))
        for place, value, (_, above) in zip(places, values, ends, strict=True):
            text = f" {si_prefix(value)}  (×{value / values[0]:.2f})"
            axes.text(value + above, place, text, va="center", fontsize=9)
        axes.set(title=title, xlabel=data["unit"], xlim=(0, 1.7 * reach))
        axes.xaxis.set_major_formatter(si_prefix)
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(places, labels=list(case))
        axes.grid(False, axis="y")
    return save(figure, path)


def _grouped_bars(
    axes: Any, domains: Sequence[str], models: Mapping[str, Mapping[str, Any]]
) -> None:
    places = np.arange(len(domains), dtype=float)
    width = 0.84 / len(models)
    experts = [name for name in models if name.startswith("expert")]
    others = iter([COLOURS[c] for c in ("vermillion", "orange", "green", "purple")] * 4)
    blues = iter(np.linspace(0.45, 0.85, max(len(experts), 1)))
    for index, (name, model) in enumerate(models.items()):
        _, value, low, high = series(name, {"x": places, **model}, "x")
        colour = _blue(next(blues)) if name in experts else next(others)
        axes.bar(
            places + (index - (len(models) - 1) / 2) * width,
            value,
            0.92 * width,
            yerr=None if low is None else np.maximum([value - low, high - value], 0.0),
            color=colour,
            label=name,
            error_kw={"elinewidth": 1.0, "capsize": 2},
        )
    axes.set_xticks(places, labels=domains)
    axes.grid(False, axis="x")


def _blue(darkness: float) -> tuple[float, ...]:
    import matplotlib

    return matplotlib.colormaps["Blues"](darkness)


def _cloud(axes: Any, x: np.ndarray, y: np.ndarray, outside: np.ndarray | None) -> None:
    """Points, in two colours where two classes are given, or a density of many."""
    if outside is None and x.size > _DENSE:
        axes.hexbin(
            x, y, xscale="log", yscale="log", gridsize=45, bins="log", mincnt=1,
            cmap="viridis", linewidths=0.1,
        )  # fmt: skip
        return
    size = {"s": 7 if x.size < 800 else 3, "alpha": 0.45, "linewidths": 0}
    groups = (
        [("", np.ones(x.shape, bool), "blue")]
        if outside is None
        else [("own domain", ~outside, "blue"), ("other domain", outside, "vermillion")]
    )
    for label, chosen, colour in groups:
        axes.scatter(
            x[chosen], y[chosen], color=COLOURS[colour], label=label or None,
            rasterized=True, **size,
        )  # fmt: skip
    if outside is not None:
        axes.legend(markerscale=2.5)


def _above_minimum(title: str, energy: Any, shape: tuple[int, int]) -> np.ndarray:
    energy = np.asarray(energy, float)
    if energy.shape != shape:
        raise ValueError(
            f"energy {title!r} has shape {energy.shape}; expected [y, x] = {shape}"
        )
    energy = np.where(np.isfinite(energy), energy, np.nan)
    if np.isnan(energy).all():
        raise ValueError(f"energy {title!r} has no finite value to draw")
    return energy - np.nanmin(energy)


def _round_levels(top: float, levels: int) -> np.ndarray:
    """About ``levels`` contours from 0 to beyond ``top``, at round numbers."""
    from matplotlib import ticker

    return ticker.MaxNLocator(levels, steps=[1, 2, 5, 10]).tick_values(0.0, top or 1.0)


def _plain_decimals(axis: Any) -> None:
    """Ticks 0.1, 0.2, 0.5 instead of powers of ten, where few decades are spanned."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    if high / low < 1e3:
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(
            ticker.FuncFormatter(lambda value, _: f"{value:g}" if value > 0 else "")
        )
