"""How many Langevin steps on an MLP energy does a second of one core buy?

    python -m benchmarks.langevin_throughput --output=runs/bench/langevin_throughput.json

The energy is an MLP of 17 inputs and three hidden layers of 256 SiLU units, with the same
weights for all. Contenders: `run_chains` in blocks of rows, the same in one block,
blackjax's SGLD (vmap and scan), and torchebm's LangevinDynamics. torchebm is not one of
our requirements: without ``--torchebm=FOLDER``, where ``pip install --no-deps
--target=FOLDER torchebm`` has put it, or an installed one, it is reported as skipped.

Beside the rates stand the GEMM rates of jax and torch on this machine, since most of a
step is GEMM: where torch's BLAS takes a slower path on a processor, much of the ratio to
torchebm is that and not the sampler's merit.
"""

import dataclasses
import importlib
import math
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _timing as timing
from emfuse_jax.samplers import run_chains, ula
from experiments._run import run_main

Weights = list[tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """Settings of the benchmark.

    Attributes:
        chains: numbers of chains to measure.
        num_steps: Langevin steps per call.
        dim: size of a position.
        hidden: widths of the energy's hidden layers.
        block_rows: chains per block.
        step_size: of the Langevin steps.
        repeats: rounds, at least 5.
        threads: cores to use.
        torchebm: folder that holds torchebm, if it is not installed.
        output: the JSON file to write.
        smoke: tiny sizes, to see that everything runs.
    """

    chains: tuple[int, ...] = (1000, 10_000)
    num_steps: int = 30
    dim: int = 17
    hidden: tuple[int, ...] = (256, 256, 256)
    block_rows: int = 512
    step_size: float = 1e-3
    repeats: int = 7
    threads: int = 1
    torchebm: str = ""
    output: str = ""
    smoke: bool = False


SMOKE = {"chains": (6, 20), "num_steps": 3, "hidden": (8, 8), "block_rows": 8}


def init(config: ThroughputConfig) -> Weights:
    """Weights with activations of order one."""
    sizes = (config.dim, *config.hidden, 1)
    rng = np.random.default_rng(0)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        kernel = rng.normal(size=(inputs, outputs)) * math.sqrt(2 / inputs)
        layers.append((jnp.asarray(kernel, jnp.float32), jnp.zeros(outputs)))
    return layers


def energy(weights: Weights, position: jax.Array) -> jax.Array:
    """``[*batch, dim] -> [*batch]``."""
    hidden = position
    for index, (kernel, bias) in enumerate(weights):
        hidden = hidden @ kernel
        hidden = hidden + jnp.broadcast_to(bias, hidden.shape)
        if index < len(weights) - 1:
            hidden = jax.nn.silu(hidden)
    return hidden[..., 0]


def flops_per_step(config: ThroughputConfig) -> float:
    """Of one chain: a forward pass and the gradient with respect to the input."""
    sizes = (config.dim, *config.hidden, 1)
    return 4.0 * sum(a * b for a, b in itertools.pairwise(sizes))


def ours(config: ThroughputConfig, block_rows: int | None) -> Callable[..., jax.Array]:
    """This library's chains."""

    def run(weights: Weights, key: jax.Array, start: jax.Array) -> jax.Array:
        sampler = ula(lambda y: energy(weights, y), config.step_size)
        return run_chains(key, sampler, start, config.num_steps, block_rows=block_rows)[
            0
        ]

    return run


def blackjax_sgld(config: ThroughputConfig) -> Callable[..., jax.Array]:
    """blackjax's unadjusted Langevin as its documentation uses it: vmap inside scan."""
    import blackjax

    def run(weights: Weights, key: jax.Array, start: jax.Array) -> jax.Array:
        slope = jax.grad(lambda y: -energy(weights, y))
        sgld = blackjax.sgld(lambda position, minibatch: slope(position))

        def step(positions: jax.Array, step_key: jax.Array) -> tuple[jax.Array, None]:
            keys = jax.random.split(step_key, len(positions))
            move = jax.vmap(lambda k, y: sgld.step(k, y, None, config.step_size))
            return move(keys, positions), None

        keys = jax.random.split(key, config.num_steps)
        return jax.lax.scan(step, start, keys)[0]

    return run


def load_torchebm(folder: str) -> tuple[Any, str]:
    """The module and its version, or None and why there is none."""
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module("torchebm")
        importlib.import_module("torchebm.samplers")
        return module, str(module.__version__)
    except ImportError as error:
        return None, f"skipped: {error}"


def torchebm_langevin(
    config: ThroughputConfig, weights: Weights, start: jax.Array
) -> tuple[Callable[[], Any], Callable[[], np.ndarray]]:
    """torchebm's sampler on the same network, and that network's energies at the start."""
    import torch
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Energy(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            layers: list[torch.nn.Module] = []
            for kernel, bias in weights:
                linear = torch.nn.Linear(*kernel.shape)
                linear.weight.data = torch.tensor(np.asarray(kernel).T.copy())
                linear.bias.data = torch.tensor(np.asarray(bias))
                layers += [linear, torch.nn.SiLU()]
            self.network = torch.nn.Sequential(*layers[:-1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)[..., 0]

    model = Energy().requires_grad_(False)
    sampler = LangevinDynamics(model, step_size=config.step_size)
    position = torch.tensor(np.asarray(start))
    return (
        lambda: sampler.sample(x=position.clone(), n_steps=config.num_steps),
        lambda: model(position).numpy(),
    )


def study(config: ThroughputConfig, num_chains: int, gemm: Any) -> dict[str, Any]:
    """All contenders at one number of chains."""
    weights, key = init(config), jax.random.key(0)
    start = jax.random.normal(jax.random.key(1), (num_chains, config.dim))
    functions = {
        "ours": ours(config, config.block_rows),
        "ours_one_block": ours(config, None),
        "blackjax": blackjax_sgld(config),
    }
    calls, seconds = {}, {}
    for name, function in functions.items():
        calls[name], seconds[name] = timing.compiled(function, weights, key, start)
    module, version = load_torchebm(config.torchebm)
    if module is not None:
        calls["torchebm"], energies = torchebm_langevin(config, weights, start)
        # One network in both frameworks, or the comparison means nothing.
        np.testing.assert_allclose(
            energies(), energy(weights, start), rtol=1e-3, atol=1e-3
        )
    ends = {name: np.asarray(call()) for name, call in calls.items()}
    timings = timing.measure(calls, repeats=config.repeats, compile_seconds=seconds)
    units = num_chains * config.num_steps
    contenders = {name: t.summary(units) for name, t in timings.items()}
    for name, summary in contenders.items():
        rate = summary["rate_per_cpu_second"]["median"]
        gflops = rate * flops_per_step(config) * 1e-9
        library = "torch" if name == "torchebm" else "jax"
        summary["gflop_per_cpu_second"] = gflops
        summary["share_of_own_gemm_rate"] = gflops / gemm[library]["best"]
        # Different streams of noise, one law: these agree but for chance.
        summary["mean_end_energy"] = float(np.mean(energy(weights, ends[name])))
    peers = [name for name in ("blackjax", "torchebm") if name in calls]
    return {
        "chains": num_chains,
        "contenders": contenders,
        "ratio_of_ours_to": {p: timing.ratio(timings, "ours", p) for p in peers},
        "torchebm": version,
    }


def report(document: dict[str, Any]) -> str:
    """The result as a table."""
    lines = []
    for result in document["results"]["studies"]:
        lines.append(f"{result['chains']} chains: chain-steps per CPU-second")
        for name, summary in result["contenders"].items():
            rate = summary["rate_per_cpu_second"]
            lines.append(
                f"  {name:15s} {rate['median']:12,.0f} "
                f"({rate['min']:,.0f} to {rate['max']:,.0f}), "
                f"{summary['gflop_per_cpu_second']:.1f} GFLOP/s = "
                f"{summary['share_of_own_gemm_rate']:.0%} of its GEMM rate"
            )
        for peer, ratio in result["ratio_of_ours_to"].items():
            lines.append(
                f"  ours / {peer}: {ratio['median']:.2f} "
                f"({ratio['min']:.2f} to {ratio['max']:.2f})"
            )
        if result["torchebm"].startswith("skipped"):
            lines.append(f"  torchebm {result['torchebm']}")
    rates = document["results"]["gemm_gflop_per_cpu_second"]
    best = ", ".join(f"{name} {rate['best']:.0f}" for name, rate in rates.items())
    return "\n".join([*lines, f"best GEMM, GFLOP per CPU-second: {best}"])


def main(config: ThroughputConfig) -> dict[str, Any]:
    """Measures, prints and writes."""
    if config.repeats < timing.MIN_REPEATS:
        raise ValueError(
            f"repeats={config.repeats}; expected at least {timing.MIN_REPEATS}, since a "
            "median of fewer says little"
        )
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    with timing.quiet_machine(config.threads) as machine:
        width = max(config.hidden)
        rows = sorted({*config.chains, min(config.block_rows, max(config.chains))})
        shapes = [(n, width) for n in rows]
        gemm = timing.gemm_rates(shapes, repeats=config.repeats)
        studies = [study(config, n, gemm) for n in config.chains]
        results = {
            "studies": studies,
            "gemm_gflop_per_cpu_second": gemm,
            "flop_per_chain_step": flops_per_step(config),
        }
    question = (__doc__ or "").partition("\n")[0]
    document = timing.write(config.output, question, config, machine, results)
    print(report(document))
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, ThroughputConfig))
