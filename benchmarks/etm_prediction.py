"""How fast does an energy transition model predict 50 000 rows, beside plain PyTorch?

    python -m benchmarks.etm_prediction --output=runs/bench/etm_prediction.json

One step of the published rollout (Chen et al., ICML 2024, EMPO): 4×200 ReLU, a chain of 30
steps with noise from "nothing changes" for every row. Ours is `etm`'s ``predict``, whose
chains run in blocks of rows; the peer is `_torch_etm`, all rows at once as published, and
once more in blocks (of fewer rows in all: its rate does not depend on how many blocks
there are), which tells how much of the ratio is blocks and how much the library.

Before anything is timed both predict the same rows from the same weights without noise;
the largest difference is in the result. Most of the work is GEMM, so the rates of both
libraries' GEMM stand beside: part of the ratio may be the peer's BLAS.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import numpy as np

from benchmarks import _etm, _report
from benchmarks import _timing as timing
from emfuse_jax.base import History, SpaceSpec
from emfuse_jax.dynamics import SamplingConfig
from experiments import presets
from experiments._run import run_main

EMPO = SamplingConfig(
    num_steps=30,
    uncertainty_steps=0,
    margin=1.1,
    first=0.1,
    last=1e-5,
    noise=0.5,
    drift_clip=0.5,
)
"""The published chain of rollouts, its short reach included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EtmPredictionConfig:
    """Settings of the benchmark.

    Attributes:
        observation_size: of the environment.
        action_size: of the environment.
        rows: predicted per call.
        blocked_rows: rows per call of the peer in blocks.
        peer_block: rows per block of that peer.
        hidden: widths of the energy.
        sampling: the chain.
        repeats: rounds, at least 5.
        threads: cores to use.
        output: the JSON file to write.
        smoke: tiny sizes, to see that everything runs.
    """

    observation_size: int = 17
    action_size: int = 6
    rows: int = 50_000
    blocked_rows: int = 8_000
    peer_block: int = 1_000
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    sampling: SamplingConfig = EMPO
    repeats: int = 5
    threads: int = 1
    output: str = ""
    smoke: bool = False


SMOKE = {"rows": 20, "blocked_rows": 10, "peer_block": 4, "hidden": (16, 16)}


def build(config: EtmPredictionConfig, sampling: SamplingConfig, rows: int):
    """The model and its rows, with this chain."""
    model = dataclasses.replace(
        presets.etm("paper"), energy_sizes=config.hidden, sampling=sampling
    )
    spec = SpaceSpec(config.observation_size, config.action_size)
    return _etm.problem(model, spec, rows)


def ours(given: _etm.Problem) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Next observations and rewards."""

    def predict(params: Any, key: jax.Array, history: History):
        prediction = given.dynamics.model.predict(params, key, history)
        return prediction.next_observation, prediction.reward

    return predict


def peer(config: EtmPredictionConfig, given: _etm.Problem, noise: float, block: int):
    """The same prediction in PyTorch, in the box, as a call on rows of conditions."""
    from benchmarks._torch_etm import Chain, predict

    sampling = config.sampling
    chain = Chain(
        sampling.num_steps,
        first=sampling.first,
        last=sampling.last,
        noise=noise,
        drift_clip=sampling.drift_clip,
        step_clip=sampling.step_clip,
        margin=sampling.margin,
    )
    energy = _etm.peer_energy(given, config.hidden)
    size = given.positive.shape[1]
    return lambda condition: predict(energy, chain, condition, size, block)


def check(config: EtmPredictionConfig) -> dict[str, float]:
    """Both without noise on the same rows: differences in units of the box."""
    import torch

    rows = min(config.rows, 600)  # more than one block
    silent = dataclasses.replace(config.sampling, noise=0.0)
    given = build(config, silent, rows)
    scales, history = given.state.params.scales, given.batch.history
    following, reward = jax.jit(ours(given))(
        given.state.params, jax.random.key(0), history
    )
    change = np.asarray(following - history.observation[0])
    target = np.concatenate([change, np.asarray(reward)[:, None]], axis=1)
    target = target / np.asarray(scales.target.scale)
    theirs = peer(config, given, 0.0, rows)(torch.tensor(given.condition)).numpy()
    return _etm.require_agreement(
        {
            "max_abs_difference": float(np.abs(target - theirs).max()),
            "mean_abs_move": float(np.abs(theirs).mean()),
            "relative_difference": _etm.relative(target - theirs, theirs),
        }
    )


def measure(config: EtmPredictionConfig) -> dict[str, Any]:
    """Rows per second of all contenders, in turns."""
    given = build(config, config.sampling, config.rows)
    arguments = (given.state.params, jax.random.key(0), given.batch.history)
    call, seconds = timing.compiled(ours(given), *arguments)
    calls, units = {"ours": call}, {"ours": config.rows}
    checks: Any = _report.NO_TORCH
    try:
        import torch
    except ImportError:
        pass
    else:
        checks = check(config)
        condition = torch.tensor(given.condition)
        part = condition[: config.blocked_rows]
        noise = config.sampling.noise
        at_once = peer(config, given, noise, config.rows)
        in_blocks = peer(config, given, noise, config.peer_block)
        calls["pytorch"] = lambda: at_once(condition)
        calls["pytorch_blocks"] = lambda: in_blocks(part)
        units |= {"pytorch": config.rows, "pytorch_blocks": len(part)}
    timings = timing.measure(
        calls, repeats=config.repeats, compile_seconds={"ours": seconds}
    )
    return {
        "same_computation": checks,
        "contenders": _report.contenders(timings, units),
        "ratio_of_ours_to": {
            name: _report.ratio(timings, units, "ours", name)
            for name in calls
            if name != "ours"
        },
    }


def report(results: dict[str, Any]) -> str:
    """The result as a table."""
    lines = ["rows per CPU-second"]
    for name, summary in results["contenders"].items():
        lines.append(_report.rate_line(name, summary))
    for name, value in results["ratio_of_ours_to"].items():
        lines.append(_report.ratio_line(f"ours / {name}", value))
    lines.append(f"  same computation: {results['same_computation']}")
    return "\n".join([*lines, _report.gemm_line(results["gemm_gflop_per_cpu_second"])])


def main(config: EtmPredictionConfig) -> dict[str, Any]:
    """Measures, prints and writes."""
    _report.check_repeats(config.repeats)
    if config.smoke:
        chain = dataclasses.replace(config.sampling, num_steps=3)
        config = dataclasses.replace(config, sampling=chain, **SMOKE)
    with timing.quiet_machine(config.threads) as machine:
        results = measure(config)
        width = max(config.hidden)
        shapes = [(n, width) for n in (config.sampling.block_rows, config.rows)]
        results["gemm_gflop_per_cpu_second"] = timing.gemm_rates(
            shapes, repeats=config.repeats
        )
    question = (__doc__ or "").partition("\n")[0]
    document = timing.write(config.output, question, config, machine, results)
    print(report(results))
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, EtmPredictionConfig))
