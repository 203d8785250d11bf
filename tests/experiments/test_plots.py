import doctest

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from experiments import _figure, _plots


def series(axis, values, spread=0.1):
    values = np.asarray(values, float)
    low, high = values * (1 - spread), values * (1 + spread)
    return {
        **axis,
        "value": values.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }


@pytest.fixture(scope="module")
def cloud():
    rng = np.random.default_rng(0)
    uncertainty = np.exp(rng.normal(size=4000))
    error = uncertainty * np.exp(0.3 * rng.normal(size=4000))
    return {"uncertainty": uncertainty, "error": error, "spearman": 0.9}


def learning_curves(_):
    steps = {"step": [0, 1000, 2000]}
    return _plots.learning_curves, {
        "curves": {
            "fused": series(steps, [1.0, 2.0, 3.0]),
            "expert 1": {**steps, "value": [1.0, None, 2.0]},
        },
        "references": {"behaviour": 1.5},
    }


def model_error_bars(_):
    models = {name: series({}, [0.1, 0.3]) for name in ("expert 1", "fused")}
    return _plots.model_error_bars, {"domains": ["slow", "fast"], "models": models}


def k_step_errors(_):
    curve = series({"k": [1, 5, 10]}, [0.1, 0.2, 0.4])
    return _plots.k_step_errors, {"models": {"fused": curve, "expert 1": curve}}


def uncertainty_against_error(cloud):
    few = {key: cloud[key][:50] for key in ("uncertainty", "error")}
    few["outside"] = [0, 1] * 25
    few["error"] = np.where(np.arange(50) == 3, 0.0, few["error"])
    return _plots.uncertainty_against_error, {
        "panels": {"expert 1": few, "fused": cloud}
    }


def energy_landscapes(_):
    x, y = np.linspace(-1, 1, 9), np.linspace(-2, 2, 7)
    energy = x[None] ** 2 + y[:, None] ** 2
    energies = {"expert 1": energy, "flat": 0 * energy, "fused": energy - 7.0}
    energies["expert 1"][0, 0] = np.inf
    return _plots.energy_landscapes, {
        "x": x, "y": y, "energies": energies, "truth": [0.5, 0.5],
        "samples": {"fused": [[0.1, -0.2], [0.0, 0.3]]},
    }  # fmt: skip


def bench_bars(_):
    case = {
        "ours": {"median": 2e5, "low": 1.9e5, "high": 2.2e5},
        "theirs": {"median": 1e5},
    }
    return _plots.bench_bars, {"unit": "steps / s", "cases": {"1k chains": case}}


ALL = [
    learning_curves,
    model_error_bars,
    k_step_errors,
    uncertainty_against_error,
    energy_landscapes,
    bench_bars,
]


@pytest.mark.parametrize("example", ALL, ids=lambda f: f.__name__)
def test_every_picture_is_drawn(example, cloud, tmp_path):
    before = dict(matplotlib.rcParams)
    plot, data = example(cloud)
    path = plot(data, tmp_path / "new" / "folder" / "picture.png")
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > 200
    # Not a blank page: ink, and more colours than the grey of axes and text.
    colours = np.unique((image[..., :3] * 15).astype(int).reshape(-1, 3), axis=0)
    assert (np.ptp(colours, axis=1) > 4).sum() >= 1
    assert 0.01 < (image[..., :3].min(axis=-1) < 0.9).mean() < 0.95
    # Nothing half written is left, and the caller's settings are untouched.
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]
    assert dict(matplotlib.rcParams) == before


def test_a_line_with_a_gap_and_its_band_reach_the_axes():
    figure, (axes,) = _figure.axes_grid(1, size=(3, 3))
    data = {
        "step": [0, 1, 2],
        "value": [1, None, 3],
        "low": [0, 1, 2],
        "high": [2, 3, 4],
    }
    style = {"color": "k", "marker": "o"}
    _figure.band(axes, *_figure.series("a", data, "step"), label="a", **style)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1, np.nan, 3])
    assert axes.collections[0].get_datalim(axes.transData).y1 == 4
    del figure


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(ValueError, match=r"'a' has lengths \{'step': 2, 'value': 1\}"):
        _plots.learning_curves({"curves": {"a": {"step": [0, 1], "value": [1]}}}, path)
    with pytest.raises(ValueError, match=r"no \['high'\]"):
        _figure.series("a", {"k": [1], "value": [1], "low": [1]}, "k")
    with pytest.raises(ValueError, match="nothing to draw"):
        _plots.uncertainty_against_error({"panels": {}}, path)
    panel = {"uncertainty": [1, 2], "error": [1]}
    with pytest.raises(ValueError, match="2 uncertainties and 1 errors"):
        _plots.uncertainty_against_error({"panels": {"a": panel}}, path)
    with pytest.raises(ValueError, match=r"\(2, 1\); expected \[y, x\] = \(1, 2\)"):
        _plots.energy_landscapes(
            {"x": [0, 1], "y": [0], "energies": {"a": [[1], [2]]}}, path
        )
    assert not path.exists()


def test_examples():
    assert doctest.testmod(_figure).failed == 0
