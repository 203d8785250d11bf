"""Pictures of language models' results: plain dicts in, one PNG out, as in `_plots`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments._figure import PathLike, axes_grid, save, styled


@styled
def domain_matrix(
    data: Mapping[str, Any],
    path: PathLike,
    *,
    label: str = "bits per byte above the best of the column",
    best: str = "min",
) -> pathlib.Path:
    """A heat map of methods by domain: the darker, the further from the column's best.

    Args:
        data: ``{"table": {domain: {method: {"mean": m, "interval": [low, high] | None}}}}``.
        path: of the PNG.
        label: what the colours mean, with its unit.
        best: ``"min"`` or ``"max"``.
    """
    table = data["table"]
    domains, methods = list(table), list(next(iter(table.values())))
    means = np.array([[table[d][m]["mean"] for d in domains] for m in methods], float)
    top = np.nanmin(means, axis=0) if best == "min" else np.nanmax(means, axis=0)
    behind = np.abs(means - top)
    size = (2.6 + 1.25 * len(domains), 1.1 + 0.34 * len(methods))
    figure, (axes,) = axes_grid(1, size=size)
    # Columns differ in how hard their text is, not in how methods compare.
    limit = float(np.nanquantile(behind, 0.9)) or 1.0
    image = axes.imshow(behind, cmap="viridis_r", vmin=0.0, vmax=limit, aspect="auto")
    for row, method in enumerate(methods):
        for column, domain in enumerate(domains):
            cell = table[domain][method]
            text = f"{cell['mean']:.3f}"
            if cell.get("interval"):
                low, high = cell["interval"]
                text += f" ±{(high - low) / 2:.2f}"
            dark = behind[row, column] > 0.55 * limit
            style = {"color": "white" if dark else "black", "fontsize": 8}
            if behind[row, column] == 0:
                style["fontweight"] = "bold"
            axes.text(column, row, text, ha="center", va="center", **style)
    axes.set_xticks(range(len(domains)), labels=domains)
    axes.set_yticks(range(len(methods)), labels=methods)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=label, extend="max")
    return save(figure, path)
