"""What the throughput benchmarks say in the same way: rates, ratios, refusals."""

from collections.abc import Mapping
from typing import Any

from benchmarks import _timing as timing

NO_TORCH = "skipped: torch is not installed"


def check_repeats(repeats: int) -> None:
    """Refuses medians of too few.

    Raises:
        ValueError: if there are fewer than `_timing.MIN_REPEATS`.
    """
    if repeats < timing.MIN_REPEATS:
        raise ValueError(
            f"repeats={repeats}; expected at least {timing.MIN_REPEATS}, since a median "
            "of fewer says little"
        )


def contenders(
    timings: Mapping[str, timing.Timing], units: Mapping[str, float]
) -> dict[str, Any]:
    """Seconds and rates of each.

    Args:
        timings: from `_timing.measure`.
        units: work of one call of each.
    """
    return {
        name: {**t.summary(units[name]), "units_per_call": units[name]}
        for name, t in timings.items()
    }


def ratio(
    timings: Mapping[str, timing.Timing],
    units: Mapping[str, float],
    name: str,
    peer: str,
) -> dict[str, float]:
    """How many times faster ``name`` is than ``peer``, round by round, per unit."""
    work = units[name] / units[peer]
    seconds = timing.ratio(timings, name, peer)
    return {key: value * work for key, value in seconds.items()}


def rate_line(name: str, summary: Mapping[str, Any]) -> str:
    """Median rate and its range."""
    rate = summary["rate_per_cpu_second"]
    return f"  {name:16s} {rate['median']:12,.5g} ({rate['min']:,.5g} to {rate['max']:,.5g})"


def ratio_line(name: str, value: Mapping[str, float]) -> str:
    """Median ratio and its range."""
    return f"  {name}: {value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def gemm_line(rates: Mapping[str, Any]) -> str:
    """The best matrix product of each library."""
    best = ", ".join(f"{name} {rate['best']:.0f}" for name, rate in rates.items())
    return f"best GEMM, GFLOP per CPU-second: {best}"
