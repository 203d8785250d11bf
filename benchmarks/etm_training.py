"""What does a training step of the energy transition model cost, beside plain PyTorch?

    python -m benchmarks.etm_training --output=runs/bench/etm_training.json

The published update (Chen et al., ICML 2024): 4×200 ReLU, 1024 rows, 16 negatives each
from a Langevin chain of 50 steps, InfoNCE, gradient penalty, Adam with L2. Ours is `etm`
in the ``paper`` preset; the peer is `_torch_etm`, written from the same equations.

Before anything is timed both make one step from the same weights, rows and chain starts,
without noise: the differences of loss, penalty and weight gradients are in the result, and
a benchmark of two different computations is refused. Most of a step is GEMM, so the rates
of both libraries' GEMM stand beside: part of the ratio may be the peer's BLAS.
"""

import dataclasses
import os
import sys
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import numpy as np
import optax

from benchmarks import _etm, _report
from benchmarks import _timing as timing
from emfuse_jax.base import SpaceSpec
from emfuse_jax.dynamics import EtmConfig
from experiments import presets
from experiments._run import run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class EtmTrainingConfig:
    """Settings of the benchmark.

    Attributes:
        observation_size: of the environment.
        action_size: of the environment.
        model: the recipe.
        check_rows: rows of the comparison of one step.
        repeats: rounds, at least 5.
        threads: cores to use.
        output: the JSON file to write.
        smoke: tiny sizes, to see that everything runs.
    """

    observation_size: int = 17
    action_size: int = 6
    model: EtmConfig = presets.etm("paper")  # noqa: RUF009
    check_rows: int = 64
    repeats: int = 5
    threads: int = 1
    output: str = ""
    smoke: bool = False


def shrink(config: EtmTrainingConfig) -> EtmTrainingConfig:
    """Tiny sizes."""
    model = dataclasses.replace(
        config.model,
        energy_sizes=(16, 16),
        batch_size=8,
        energy_rows=8,
        num_negatives=2,
        chain_steps=3,
    )
    return dataclasses.replace(config, model=model, check_rows=8)


def peer_training(given: _etm.Problem, model: EtmConfig) -> Any:
    """The same recipe in PyTorch, from the same weights."""
    from benchmarks._torch_etm import Chain, Training

    chain = Chain(
        model.chain_steps,
        noise=model.chain_noise,
        drift_clip=model.drift_clip,
        step_clip=model.step_clip,
        margin=model.chain_margin,
    )
    return Training(
        _etm.peer_energy(given, model.energy_sizes),
        chain,
        num_negatives=model.num_negatives,
        margin=model.penalty_margin,
        learning_rate=model.learning_rate,
        # Coupled L2 beside a summed loss: as strong as ours beside a mean.
        weight_decay=model.weight_decay * model.batch_size,
    )


def check(config: EtmTrainingConfig) -> dict[str, float]:
    """One step of both, same weights, rows and chain starts, no noise."""
    import torch

    model = dataclasses.replace(
        _etm.silent(config.model),
        batch_size=config.check_rows,
        energy_rows=min(config.model.energy_rows, config.check_rows),
    )
    spec = SpaceSpec(config.observation_size, config.action_size)
    given = _etm.problem(model, spec, config.check_rows)
    key = jax.random.key(1)
    state, metrics = jax.jit(given.dynamics.update)(key, given.state, given.batch)
    # The keys that the update and its loss split off; a change there shows as an error.
    key_start = jax.random.split(jax.random.split(key)[1])[0]
    shape = (model.num_negatives, *given.positive.shape)
    initial = jax.random.uniform(key_start, shape, minval=-1.0, maxval=1.0)
    peer = peer_training(given, model)
    contrast, penalty = peer.update(
        torch.tensor(given.condition),
        torch.tensor(given.positive),
        torch.tensor(np.swapaxes(initial, 0, 1).copy()),
    )
    # Adam's first moment after one step is a tenth of the gradient.
    moment = optax.tree_utils.tree_get(state.optimizer, "mu")[-1]["params"]
    moment = jax.tree.map(lambda leaf: 10.0 * np.asarray(leaf), moment)
    first = [moment["condition_layer"]["kernel"], moment["target_layer"]["kernel"]]
    last = moment["output"]["kernel"]
    theirs = [part / config.check_rows for part in peer.energy.gradient()]
    loss, slope = float(metrics["energy_loss"]), float(metrics["gradient_penalty"])
    differences = {
        "relative_loss_difference": abs(loss - contrast) / abs(loss),
        "relative_penalty_difference": abs(slope - penalty) / max(slope, 1e-6),
        "relative_first_layer_gradient_difference": _etm.relative(
            theirs[0] - np.concatenate(first), theirs[0]
        ),
        "relative_last_layer_gradient_difference": _etm.relative(
            theirs[-2] - last, theirs[-2]
        ),
    }
    return _etm.require_agreement(
        {"contrast": contrast, "penalty": penalty, **differences}
    )


def measure(config: EtmTrainingConfig) -> dict[str, Any]:
    """Steps per second of both, in turns."""
    model = config.model
    spec = SpaceSpec(config.observation_size, config.action_size)
    given = _etm.problem(model, spec, model.batch_size)
    key = jax.random.key(1)
    call, seconds = timing.compiled(
        given.dynamics.update, key, given.state, given.batch
    )
    calls = {"ours": call}
    checks: Any = _report.NO_TORCH
    try:
        import torch
    except ImportError:
        pass
    else:
        checks = check(config)
        peer = peer_training(given, model)
        condition = torch.tensor(given.condition)
        positive = torch.tensor(given.positive)
        calls["pytorch"] = lambda: peer.update(condition, positive)
    timings = timing.measure(
        calls, repeats=config.repeats, compile_seconds={"ours": seconds}
    )
    units = dict.fromkeys(calls, 1)
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
    lines = ["training steps per CPU-second"]
    for name, summary in results["contenders"].items():
        lines.append(_report.rate_line(name, summary))
    for name, value in results["ratio_of_ours_to"].items():
        lines.append(_report.ratio_line(f"ours / {name}", value))
    lines.append(f"  same computation: {results['same_computation']}")
    return "\n".join([*lines, _report.gemm_line(results["gemm_gflop_per_cpu_second"])])


def main(config: EtmTrainingConfig) -> dict[str, Any]:
    """Measures, prints and writes."""
    _report.check_repeats(config.repeats)
    if config.smoke:
        config = shrink(config)
    model = config.model
    with timing.quiet_machine(config.threads) as machine:
        results = measure(config)
        width = max(model.energy_sizes)
        shapes = [(model.batch_size * model.num_negatives, width)]
        results["gemm_gflop_per_cpu_second"] = timing.gemm_rates(
            shapes, repeats=config.repeats
        )
    question = (__doc__ or "").partition("\n")[0]
    document = timing.write(config.output, question, config, machine, results)
    print(report(results))
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, EtmTrainingConfig))
