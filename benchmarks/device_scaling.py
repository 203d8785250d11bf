"""What does spreading work over devices cost, beside the work itself?

    python -m benchmarks.device_scaling --output=runs/bench/device_scaling.json

Training steps of an ETM (`data_parallel`), Langevin chains and rollouts in two fused ADETMs
(both `shard_rows`), on 1, 2, 4 and 8 devices, each number in a process of its own. *Strong*:
the same rows on more devices; *weak*: rows in proportion to the devices. Beside each stands
the plain function, not lifted, with the same rows on one device of the same process; both
take turns, and ``cost`` is their ratio, round by round.

The devices are one CPU core that poses as several, so nothing here becomes faster: with no
overhead at all ``cost`` would be 1 for every number of devices, and what it is above 1 is
the price of cutting, of dispatching N programs and of exchanging gradients, at the shares of
rows that N devices have. CPU seconds leave out waiting for the core, the wall clock does not.
With ``--nofake`` and several accelerators the same table holds speed-ups: ``cost`` of the
wall clock, where 1 / N is ideal.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _etm, _report, fusion_cost, langevin_throughput
from benchmarks import _timing as timing
from emfuse_jax import artifacts
from emfuse_jax.base import SpaceSpec
from emfuse_jax.dynamics import (
    AdetmConfig,
    Batch,
    EtmConfig,
    fuse_dynamics,
    uncertainty_weights,
)
from emfuse_jax.parallel import (
    ROW_KEY,
    data_parallel,
    make_mesh,
    replicate,
    shard_rows,
    split,
)
from emfuse_jax.tree import stack
from experiments import presets
from experiments._run import run_main


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Settings of the benchmark.

    Attributes:
        devices: how many, in turn.
        workloads: of training, chains and rollouts.
        batch: rows of a training step; all sizes are those of strong scaling and of one
            device in weak scaling.
        chains: numbers of chains.
        rollouts: branches of a rollout.
        num_steps: Langevin steps of a chain.
        hidden: widths of the chains' energy.
        horizon: steps of a branch.
        etm: the model that is trained.
        adetm: the experts of the rollouts.
        observation_size: of the environment.
        action_size: of the environment.
        repeats: rounds, at least 5.
        threads: cores that the devices share.
        fake: let the CPU pose as the devices; else those that there are, as far as they go.
        output: the JSON file to write.
        smoke: tiny sizes, to see that everything runs.
    """

    devices: tuple[int, ...] = (1, 2, 4, 8)
    workloads: tuple[str, ...] = ("training", "chains", "rollouts")
    batch: int = 256
    chains: int = 1024
    rollouts: int = 256
    num_steps: int = 30
    hidden: tuple[int, ...] = (256, 256, 256)
    horizon: int = 5
    etm: EtmConfig = presets.etm("fast")  # noqa: RUF009
    adetm: AdetmConfig = presets.adetm("fast")  # noqa: RUF009
    observation_size: int = 17
    action_size: int = 6
    repeats: int = 7
    threads: int = 1
    fake: bool = True
    output: str = ""
    smoke: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.workloads) - set(WORKLOADS)
        if unknown or not self.workloads or min(self.devices, default=0) < 1:
            raise ValueError(
                f"workloads={self.workloads}, devices={self.devices}; expected some of "
                f"{', '.join(WORKLOADS)} and positive numbers"
            )


SMOKE = {"batch": 16, "chains": 16, "rollouts": 16, "num_steps": 2, "horizon": 2} | {
    "hidden": (8, 8)
}
TINY_ETM = {"energy_sizes": (8, 8), "head_sizes": (8,)}


def shrunk(config: ScalingConfig) -> ScalingConfig:
    """Everything tiny."""
    adetm = dataclasses.replace(config.adetm, **fusion_cost.TINY)
    etm = dataclasses.replace(config.etm, **TINY_ETM)
    return dataclasses.replace(config, adetm=adetm, etm=etm, **SMOKE)


class Work(NamedTuple):
    """One call, as it is and lifted onto a mesh, with the same arguments."""

    plain: Callable[..., Any]
    lifted: Callable[..., Any]
    args: tuple[Any, ...]
    placed: tuple[Any, ...]
    """The arguments where the devices of the mesh want them."""


def training(config: ScalingConfig, rows: int, mesh: Any) -> Work:
    """A gradient step; gradients are summed over the devices."""
    spec = SpaceSpec(config.observation_size, config.action_size)
    problem = _etm.problem(config.etm, spec, rows)
    axes = Batch(history=1, reward=0, next_observation=0)
    lifted = data_parallel(problem.dynamics, mesh, batch_axes=axes)
    key, state, batch = jax.random.key(0), problem.state, problem.batch
    shares = Batch(
        split(batch.history, mesh, row_axis=1),
        split(batch.reward, mesh),
        split(batch.next_observation, mesh),
    )
    placed = (replicate(key, mesh), replicate(state, mesh), shares)
    return Work(problem.dynamics.update, lifted.update, (key, state, batch), placed)


def chains(config: ScalingConfig, rows: int, mesh: Any) -> Work:
    """Langevin chains on an MLP energy; nothing is exchanged."""
    sizes = langevin_throughput.ThroughputConfig(
        num_steps=config.num_steps, hidden=config.hidden, dim=config.observation_size
    )
    block = sizes.block_rows
    start = jax.random.normal(jax.random.key(1), (rows, sizes.dim))
    shared = (langevin_throughput.init(sizes), jax.random.key(0))
    alone = langevin_throughput.ours(sizes, None)
    return Work(
        langevin_throughput.ours(sizes, block),
        shard_rows(alone, mesh, block_size=block),
        (*shared, start),
        (*replicate(shared, mesh), split(start, mesh)),
    )


def rollouts(config: ScalingConfig, rows: int, mesh: Any) -> Work:
    """Branches in two fused experts with slice uncertainty; nothing is exchanged."""
    sizes = fusion_cost.FusionCostConfig(
        rows=rows,
        horizon=config.horizon,
        model=config.adetm,
        observation_size=config.observation_size,
        action_size=config.action_size,
    )
    slices = config.adetm.num_lags
    expert = fusion_cost.architecture(sizes, slices)
    params = stack(fusion_cost.experts(sizes, expert, slices, 2))
    model = fuse_dynamics(expert.model, uncertainty_weights())
    imagine = fusion_cost.imagine(sizes, model)
    shared, history = (params, jax.random.key(0)), fusion_cost.windows(sizes, slices)
    lifted = shard_rows(imagine, mesh, in_axes=(None, ROW_KEY, 1), out_axes=1)
    placed = (*replicate(shared, mesh), split(history, mesh, row_axis=1))
    return Work(imagine, lifted, (*shared, history), placed)


ROOT = pathlib.Path(__file__).parents[1]
WORKLOADS: dict[str, tuple[Callable[..., Work], str, int]] = {
    "training": (training, "batch", 32),
    "chains": (chains, "chains", 1),
    "rollouts": (rollouts, "rollouts", 4),
}
"""What makes it, which setting holds its rows, and how many calls are timed as one: a
step of milliseconds alone scatters by its own size."""


def several(call: Callable[[], Any], times: int) -> Callable[[], None]:
    """One call after the other, as `fit` waits for its chunks."""

    def run() -> None:
        for _ in range(times):
            jax.block_until_ready(call())

    return run


def study(config: ScalingConfig, name: str, rows: int) -> dict[str, Any]:
    """Plain and lifted, on the first devices."""
    (devices,) = config.devices
    make, _, times = WORKLOADS[name]
    work = make(config, rows, make_mesh({"data": devices}))
    calls, seconds = {}, {}
    for contender, function, args in (
        ("plain", work.plain, work.args),
        ("lifted", work.lifted, work.placed),
    ):
        calls[contender], seconds[contender] = timing.compiled(function, *args)
    ends = [jax.tree.leaves(call()) for call in (calls["lifted"], calls["plain"])]
    if name == "training":  # one computation, or the comparison means nothing
        for ours, plain in zip(*ends, strict=True):
            np.testing.assert_allclose(ours, plain, rtol=1e-2, atol=1e-4)
    timed = {contender: several(call, times) for contender, call in calls.items()}
    timings = timing.measure(timed, repeats=config.repeats, compile_seconds=seconds)
    walls = zip(timings["lifted"].wall, timings["plain"].wall, strict=True)
    return {
        "devices": devices,
        "rows": rows,
        "calls": times,
        "contenders": {name: t.summary(rows * times) for name, t in timings.items()},
        "cost": timing.ratio(timings, "plain", "lifted"),
        "cost_of_the_clock": timing.spread([lifted / plain for lifted, plain in walls]),
        # Of numbers that are the same on any number of devices.
        "mean": float(np.mean([np.mean(_numbers(leaf)) for leaf in ends[0]])),
    }


def _numbers(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, np.float64)


def measure(config: ScalingConfig) -> dict[str, Any]:
    """Every workload on the one number of devices; none where there are not so many."""
    (devices,) = config.devices
    if devices > jax.device_count():
        return {}
    workloads = {}
    for name in config.workloads:
        rows = getattr(config, WORKLOADS[name][1])
        strong = study(config, name, rows)
        weak = strong if devices == 1 else study(config, name, rows * devices)
        workloads[name] = {"strong": strong, "weak": weak}
    return workloads


def spawn(config: ScalingConfig, devices: int, folder: pathlib.Path) -> dict[str, Any]:
    """What `work` says in a process that has so many devices."""
    given, output = folder / f"{devices}.config.json", folder / f"{devices}.json"
    settings = dataclasses.replace(config, devices=(devices,), output=str(output))
    artifacts.write_json(given, artifacts.to_json(settings))
    # A small pool of threads and many exchanges in flight would wait for each other.
    environment = {**os.environ, "NPROC": "16"}
    if config.fake:
        environment["JAX_PLATFORMS"] = "cpu"
    script = (
        "import sys; from benchmarks import device_scaling as d; d.work(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(given)]
    subprocess.run(command, env=environment, check=True, cwd=ROOT)
    return artifacts.read_json(output)


def work(given: str) -> None:
    """Measures on the one number of devices that a config file names."""
    config = artifacts.from_json(ScalingConfig, artifacts.read_json(given))
    if config.fake:
        jax.config.update("jax_num_cpu_devices", config.devices[0])
    with timing.quiet_machine(config.threads) as machine:
        workloads = measure(config)
    artifacts.write_json(config.output, {"machine": machine, "workloads": workloads})


def curves(documents: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The workers' results by workload and kind of scaling.

    Raises:
        ValueError: if a computation depends on the number of devices.
    """
    found: dict[str, Any] = {}
    for document in documents.values():
        for name, kinds in document["workloads"].items():
            entry = found.setdefault(name, {"strong": [], "weak": []})
            for kind, result in kinds.items():
                entry[kind].append(result)
    for name, entry in found.items():
        means = [result["mean"] for result in entry["strong"]]
        if not np.allclose(means, means[0], rtol=1e-2, atol=1e-4):
            raise ValueError(f"{name} depends on the number of devices: means {means}")
    return found


def report(results: dict[str, Any]) -> str:
    """The result as a table."""
    lines = ["cost = lifted / plain: CPU seconds (min to max), and the clock"]
    for name, entry in results["workloads"].items():
        for kind, rows in entry.items():
            for row in rows:
                cost, clock = row["cost"], row["cost_of_the_clock"]["median"]
                seconds = row["contenders"]["lifted"]["cpu_seconds"]["median"]
                seconds /= row["calls"]
                lines.append(
                    f"  {name:9s} {kind:6s} {row['devices']:2d} devices, "
                    f"{row['rows']:6d} rows: {cost['median']:5.2f} "
                    f"({cost['min']:.2f} to {cost['max']:.2f}), clock {clock:5.2f}; "
                    f"{seconds:.4f} CPU seconds a call"
                )
    return "\n".join(lines)


def main(config: ScalingConfig) -> dict[str, Any]:
    """Measures, prints and writes."""
    _report.check_repeats(config.repeats)
    if config.smoke:
        config = shrunk(config)
    with tempfile.TemporaryDirectory() as folder:
        documents = {
            devices: spawn(config, devices, pathlib.Path(folder))
            for devices in config.devices
        }
    results = {"workloads": curves(documents)}
    machine = {str(n): document["machine"] for n, document in documents.items()}
    question = (__doc__ or "").partition("\n")[0]
    document = timing.write(
        config.output, question, config, {"by_devices": machine}, results
    )
    print(report(results))
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, ScalingConfig))
