r"""What do the two kinds of negatives cost, and what do they reach for equal CPU time?

    python -m benchmarks.negatives --output=runs/bench/negatives.json
    python -m benchmarks.negatives --data=a.hdf5,b.hdf5 --seconds=60

``proposal`` (ranking NCE against draws of known density around a Gaussian head) and
``langevin`` (the published recipe: InfoNCE against chains of the model itself) train an
ADETM of the same sizes. First the cost of a training step, in turns. Then, per data set,
one model of each kind is trained for ``--seconds`` of CPU time and scored on held-out
episodes: one-step error (units: standard deviation of Δs) and negative log-likelihood
(nats, in these units). Without ``--data`` a packaged policy records a data set.

The likelihood needs the partition function of every row, by importance sampling in two
stages: draws from a wide mixture give the moments of a Gaussian, which with a box part
gives the estimate. Few effective draws mean that a number is too good to be true. An
energy trained by chains is normalised over the box that its chains live in, the only place
where anything shaped it.
"""

import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp

from benchmarks import _partition as partition
from benchmarks import _quality as quality
from benchmarks import _report
from benchmarks import _timing as timing
from benchmarks._weights import untrained
from benchmarks.model_quality import train
from emfuse_jax.base import SpaceSpec
from emfuse_jax.dynamics import AdetmConfig, adetm, fit_scales, sample_windows
from experiments import presets
from experiments._measure import Domain, load_domains, pooled_unit
from experiments._run import run_main
from experiments.collect_data import CollectConfig
from experiments.collect_data import run as collect


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """Settings of the benchmark.

    Attributes:
        data: HDF5 files, one model of each kind for each; none: record one.
        policy: records the data where there are none: a packaged policy or random.
        steps: rows to record.
        seconds: CPU time per model.
        model: the sizes, and the recipe with a proposal.
        num_negatives: of the recipe with chains, and of the proposal on all rows.
        langevin_batch_size: rows per update in the equal-time run with chains, where
            smaller batches do better.
        rows: held-out rows of the likelihood.
        draws: per row and stage, at least 1000.
        repeats: rounds of the step's cost, at least 5.
        threads: cores to use.
        seed: of data, weights and batches.
        output: the JSON file to write.
        smoke: tiny sizes, to see that everything runs.
    """

    data: tuple[str, ...] = ()
    policy: str = "hopper_medium"
    steps: int = 15_000
    seconds: float = 45.0
    model: AdetmConfig = presets.adetm("fast")  # noqa: RUF009
    num_negatives: int = 16
    langevin_batch_size: int = 64
    rows: int = 150
    draws: int = 4000
    repeats: int = 5
    threads: int = 1
    seed: int = 0
    output: str = ""
    smoke: bool = False

    def __post_init__(self) -> None:
        if self.draws < 1000:
            raise ValueError(
                f"draws={self.draws}; expected at least 1000, or the partition function "
                "is a guess"
            )


SMOKE = {
    "policy": "random",
    "steps": 600,
    "seconds": 0.05,
    "num_negatives": 2,
    "langevin_batch_size": 4,
    "rows": 5,
    "draws": 1000,
}
TINY = {
    "num_lags": 2,
    "batch_size": 8,
    "energy_rows": 4,
    "num_negatives": 2,
    "chain_steps": 2,
    "energy_sizes": (8, 8),
    "head_sizes": (8,),
    "state_features": 8,
    "action_features": 8,
    "num_heads": 2,
}


def recipes(config: NegativesConfig) -> dict[str, AdetmConfig]:
    """What a step is measured of; the first two train."""
    model = config.model
    return {
        "proposal": dataclasses.replace(model, head_phase=0.0),
        "langevin": dataclasses.replace(
            model,
            negatives="langevin",
            num_negatives=config.num_negatives,
            energy_rows=min(model.energy_rows, config.langevin_batch_size),
        ),
        "proposal_head_alone": dataclasses.replace(model, head_phase=1.0),
        "proposal_all_rows": dataclasses.replace(
            model,
            head_phase=0.0,
            num_negatives=config.num_negatives,
            energy_rows=model.batch_size,
        ),
    }


def step_costs(config: NegativesConfig, data: Any) -> dict[str, Any]:
    """Training steps per CPU-second of each recipe, batches of one size."""
    spec = SpaceSpec(data.observation.shape[1], data.action.shape[1])
    key_batch, key_update = jax.random.split(jax.random.key(config.seed))
    arrays = jax.tree.map(jnp.asarray, data)
    model = config.model
    batch = sample_windows(key_batch, arrays, model.batch_size, model.num_lags)
    states: dict[str, Any] = {}
    calls, seconds = {}, {}
    for name, own in recipes(config).items():
        dynamics = adetm(own, spec)
        if own.negatives not in states:
            scales = fit_scales(
                data, own.num_lags, anchor=own.anchor, target=own.target_scale
            )
            states[own.negatives] = untrained(dynamics, scales)
        calls[name], seconds[name] = timing.compiled(
            dynamics.update, key_update, states[own.negatives], batch
        )
    timings = timing.measure(calls, repeats=config.repeats, compile_seconds=seconds)
    units = dict.fromkeys(calls, 1)
    return {
        "contenders": _report.contenders(timings, units),
        "langevin_costs_times": {
            name: _report.ratio(timings, units, name, "langevin")
            for name in calls
            if name != "langevin"
        },
    }


def equal_time(config: NegativesConfig, domain: Domain, work: str) -> dict[str, Any]:
    """Trains one model of each kind on a domain and scores both."""
    own = {
        "proposal": config.model,
        "langevin": dataclasses.replace(
            recipes(config)["langevin"], batch_size=config.langevin_batch_size
        ),
    }
    unit, lags = pooled_unit([domain]), config.model.num_lags
    result: dict[str, Any] = {"data": domain.name}
    for name, recipe in own.items():
        model, cost = train(
            name, "adetm", recipe, domain.train, config.seconds, config.seed, work
        )
        error = quality.errors(model, [domain], unit, lags, k_step=False)
        likelihood = partition.held_out(
            jax.random.key(config.seed),
            model,
            domain,
            unit,
            lags,
            rows=config.rows,
            draws=config.draws,
            chain_margin=recipe.chain_margin if name == "langevin" else None,
        )
        result[name] = {
            **cost,
            "batch_size": recipe.batch_size,
            "one_step": error["one_step"][0],
            **likelihood,
        }
        if name == "proposal":
            head = quality.head_nll(model, domain, unit, lags)
            result[name]["nll_of_its_head_alone"] = head["nll"]
    return result


def sources(config: NegativesConfig, folder: pathlib.Path) -> Sequence[str]:
    """The data sets, recorded now if none were given."""
    if config.data:
        return config.data
    out = str(folder / f"hopper-{config.policy}.hdf5")
    recording = CollectConfig(
        env="hopper",
        policy=config.policy,
        steps=config.steps,
        seed=config.seed,
        out=out,
    )
    collect(recording, progress=False)
    return (out,)


def report(results: dict[str, Any]) -> str:
    """The result as a table."""
    steps = results["step"]
    lines = ["training steps per CPU-second"]
    lines += [_report.rate_line(*item) for item in steps["contenders"].items()]
    for name, value in steps["langevin_costs_times"].items():
        lines.append(_report.ratio_line(f"a langevin step costs, in {name}", value))
    for domain in results["equal_time"]:
        lines.append(f"{pathlib.Path(domain['data']).stem}, equal CPU time")
        for name in ("proposal", "langevin"):
            row = domain[name]
            lines.append(
                f"  {name:9s} {row['cpu_seconds']:.1f} s, {row['steps']} steps: one-step "
                f"error {row['one_step']:.3f}, NLL {row['nll']:.2f} ± "
                f"{row['nll_standard_error']:.2f} (effective draws: median "
                f"{row['median_effective_draws']:.0f}, least "
                f"{row['least_effective_draws']:.0f} of {row['draws']})"
            )
    return "\n".join(lines)


def main(config: NegativesConfig) -> dict[str, Any]:
    """Measures, prints and writes."""
    _report.check_repeats(config.repeats)
    if config.smoke:
        model = dataclasses.replace(config.model, **TINY)
        config = dataclasses.replace(config, model=model, **SMOKE)
    with (
        tempfile.TemporaryDirectory() as folder,
        timing.quiet_machine(config.threads) as machine,
    ):
        paths = sources(config, pathlib.Path(folder))
        domains = load_domains(paths, min_length=config.model.num_lags)
        results = {
            "step": step_costs(config, domains[0].train),
            "equal_time": [
                equal_time(config, domain, str(pathlib.Path(folder) / str(index)))
                for index, domain in enumerate(domains)
            ],
        }
    question = (__doc__ or "").partition("\n")[0]
    document = timing.write(config.output, question, config, machine, results)
    print(report(results))
    return document


if __name__ == "__main__":
    sys.exit(run_main(main, NegativesConfig))
