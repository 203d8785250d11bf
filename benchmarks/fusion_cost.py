"""What does a rollout cost as experts are added, and as slices are added?

    python -m benchmarks.fusion_cost --output=runs/bench/fusion_cost.json

Rollouts of a random policy in fused ADETMs with weights from each expert's own slice
uncertainty, HalfCheetah's shapes, the ``fast`` preset. Experts of one architecture are
stacked and evaluated as one batched GEMM; the same experts as a tuple, one after another
in the program, are measured beside them. The networks are not trained: values do not
change the cost. A row is one imagined transition.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp

from benchmarks import _report
from benchmarks import _timing as timing
from benchmarks._weights import untrained
from emfuse_jax.base import Dynamics, History, SpaceSpec, TransitionModel
from emfuse_jax.data import Normalizer
from emfuse_jax.dynamics import (
    AdetmConfig,
    Scales,
    contrastive_dynamics,
    fuse_dynamics,
    rollout,
    uncertainty_weights,
)
from emfuse_jax.nets.encoder import slice_encoder
from emfuse_jax.tree import stack
from experiments import presets
from experiments._run import run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionCostConfig:
    """Settings of the benchmark.

    Attributes:
        experts: how many are fused, in turn.
        tuples: numbers of experts that are measured as a tuple as well.
        slices: how many each expert has, in turn.
        slice_experts: experts fused while the slices vary.
        rows: branches per rollout.
        horizon: steps of a branch.
        model: the architecture; its ``num_lags`` is used while the experts vary.
        observation_size: of the environment.
        action_size: of the environment.
        repeats: rounds, at least 5.
        threads: cores to use.
        output: the JSON file to write.
        smoke: tiny sizes, to see that everything runs.
    """

    experts: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    tuples: tuple[int, ...] = (1, 2, 4, 8)
    slices: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    slice_experts: int = 3
    rows: int = 2000
    horizon: int = 5
    model: AdetmConfig = presets.adetm("fast")  # noqa: RUF009
    observation_size: int = 17
    action_size: int = 6
    repeats: int = 5
    threads: int = 1
    output: str = ""
    smoke: bool = False


SMOKE = {
    "experts": (1, 2),
    "tuples": (2,),
    "slices": (1,),
    "slice_experts": 2,
    "rows": 12,
    "horizon": 2,
}
TINY = {
    "num_lags": 2,
    "energy_sizes": (8, 8),
    "head_sizes": (8,),
    "state_features": 8,
    "action_features": 8,
    "num_heads": 2,
}


def architecture(config: FusionCostConfig, slices: int) -> Dynamics:
    """An ADETM of any number of slices: `adetm` itself refuses one, which has none to
    compare."""
    model = config.model
    encoder = slice_encoder(
        model.state_features, model.action_features, model.num_heads
    )
    return contrastive_dynamics(
        encoder,
        model,
        SpaceSpec(config.observation_size, config.action_size),
        num_lags=slices,
        anchor=model.anchor,
        feature_size=model.state_features + model.action_features,
    )


def experts(config: FusionCostConfig, dynamics: Dynamics, slices: int, count: int):
    """The parameters of each, untrained."""

    def unit(*shape: int) -> Normalizer:
        return Normalizer(jnp.zeros(shape), jnp.ones(shape))

    scales = Scales(
        unit(config.observation_size),
        unit(config.action_size),
        unit(slices, config.observation_size + 1),
    )
    return [untrained(dynamics, scales, seed=i).params for i in range(count)]


def imagine(config: FusionCostConfig, model: TransitionModel) -> Callable[..., Any]:
    """A rollout of a random policy; no row ends before the horizon."""

    def policy(key: jax.Array, observation: jax.Array) -> jax.Array:
        shape = (observation.shape[0], config.action_size)
        return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)

    def run(params: Any, key: jax.Array, history: History) -> Any:
        return rollout(
            params,
            key,
            model,
            policy,
            history,
            config.horizon,
            terminated_fn=lambda s, a, following: jnp.zeros(len(following), bool),
            penalty=1.0,
        )

    return run


def windows(config: FusionCostConfig, slices: int) -> History:
    """Full histories of random steps."""
    shape = (slices, config.rows)
    keys = jax.random.split(jax.random.key(1))
    return History(
        jax.random.normal(keys[0], (*shape, config.observation_size)),
        jax.random.uniform(keys[1], (*shape, config.action_size), minval=-1.0),
        jnp.ones(shape, bool),
    )


class Contenders:
    """What is measured, as it is built."""

    def __init__(self, config: FusionCostConfig):
        self.config = config
        self.calls: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.parameters: dict[str, int] = {}

    def add(self, name: str, model: TransitionModel, params: Any, slices: int) -> None:
        """Compiles a rollout and counts what was trained of its parameters."""
        history = windows(self.config, slices)
        self.calls[name], self.seconds[name] = timing.compiled(
            imagine(self.config, model), params, jax.random.key(2), history
        )
        members = params if isinstance(params, list) else [params]
        leaves = jax.tree.leaves([tuple(member)[1:] for member in members])
        self.parameters[name] = sum(leaf.size for leaf in leaves)


def build(config: FusionCostConfig) -> Contenders:
    """Every rollout, compiled."""
    contenders, weights = Contenders(config), uncertainty_weights()
    slices = config.model.num_lags
    dynamics = architecture(config, slices)
    members = experts(config, dynamics, slices, max(config.experts + config.tuples))
    for count in config.experts:
        model = fuse_dynamics(dynamics.model, weights)
        contenders.add(f"stacked_{count}", model, stack(members[:count]), slices)
    for count in config.tuples:
        model = fuse_dynamics([dynamics.model] * count, weights)
        contenders.add(f"tuple_{count}", model, members[:count], slices)
    for number in config.slices:
        dynamics = architecture(config, number)
        members = experts(config, dynamics, number, config.slice_experts)
        model = fuse_dynamics(dynamics.model, weights)
        contenders.add(f"slices_{number}", model, stack(members), number)
    return contenders


def measure(config: FusionCostConfig) -> dict[str, Any]:
    """Rates of every rollout, and its cost in units of the first of its kind."""
    contenders = build(config)
    timings = timing.measure(
        contenders.calls,
        repeats=config.repeats,
        compile_seconds=contenders.seconds,
    )
    units = dict.fromkeys(timings, config.rows * config.horizon)
    first = {
        "stacked": f"stacked_{config.experts[0]}",
        "tuple": f"stacked_{config.experts[0]}",
        "slices": f"slices_{config.slices[0]}",
    }
    results = _report.contenders(timings, units)
    for name, summary in results.items():
        base = first[name.partition("_")[0]]
        summary["parameters"] = contenders.parameters[name]
        summary["cost_ratio_to"] = base
        summary["cost_ratio"] = timing.ratio(timings, base, name)
    return {"contenders": results}


def report(results: dict[str, Any]) -> str:
    """The result as a table."""
    lines = ["imagined rows per CPU-second"]
    for name, summary in results["contenders"].items():
        ratio = summary["cost_ratio"]["median"]
        lines.append(
            f"{_report.rate_line(name, summary)}, {summary['parameters']:,} parameters, "
            f"{ratio:.2f} x the cost of {summary['cost_ratio_to']}"
        )
    return "\n".join(lines)


def main(config: FusionCostConfig) -> dict[str, Any]:
    """Measures, prints and writes."""
    _report.check_repeats(config.repeats)
    if config.smoke:
        model = dataclasses.replace(config.model, **TINY)
        config = dataclasses.replace(config, model=model, **SMOKE)
    with timing.quiet_machine(config.threads) as machine:
        results = measure(config)
    question = (__doc__ or "").partition("\n")[0]
    document = timing.write(config.output, question, config, machine, results)
    print(report(results))
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, FusionCostConfig))
