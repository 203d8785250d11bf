r"""How good are the experts, their fusion and their uncertainty, for equal CPU time?

    python -m benchmarks.model_quality --data=a.hdf5,b.hdf5,c.hdf5 --seeds=0,1,2

Per seed it trains, each for ``--seconds`` of CPU time (one thread): one ADETM and one 2×200
β-NLL MLP per domain, a 5-member ensemble per domain, one ADETM with Langevin negatives per
domain, a Mixed Oracle on the union and one with all experts' time together. The last tenth
of each domain's episodes is scored; every choice (checkpoint, refined or not) is made on
the 5 % before them. Models already trained are found in ``--work`` and not trained again.
"""

import dataclasses
import itertools
import os
import pathlib
import sys
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _quality as quality
from benchmarks._quality import Model
from benchmarks._timing import portable
from emfuse_jax import artifacts, loops
from emfuse_jax.base import SpaceSpec
from emfuse_jax.data import concatenate
from emfuse_jax.dynamics import (
    ETM_SAMPLING,
    AdetmConfig,
    EnsembleConfig,
    SamplingConfig,
    fit_scales,
    fuse_dynamics,
    sample_windows,
    transition_model,
    uncertainty_weights,
)
from emfuse_jax.tree import stack
from experiments._measure import Domain, Measured, load_domains, pooled_unit, require
from experiments._run import run_main

LAGS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Settings of the study.

    Attributes:
        data: one HDF5 file per domain.
        seconds: CPU time per model.
        seeds: of weights and batches.
        baselines: train the ensembles and the Langevin models as well.
        work: where trained models are kept.
        out: the JSON result.
    """

    data: tuple[str, ...] = ()
    seconds: float = 40.0
    seeds: tuple[int, ...] = (0, 1, 2)
    baselines: bool = True
    work: str = "runs/model_quality"
    out: str = "benchmarks/results/model_quality.json"


def train(
    name: str, kind: str, config: Any, data: Any, seconds: float, seed: int, work: Any
) -> tuple[Model, dict[str, float]]:
    """Trains for ``seconds`` of CPU time; the number of updates comes from a short trial of
    both phases, so that the schedule fits. Compilation is not counted."""
    spec = SpaceSpec(data.observation.shape[1], data.action.shape[1])
    lags = getattr(config, "num_lags", 1)
    kwargs = (
        {"target": config.target_scale} if kind == "adetm" else {"anchor": "current"}
    )
    scales = fit_scales(data, lags, **kwargs)
    batch = config.batch_size * getattr(config, "num_members", 1)
    arrays = jax.tree.map(jnp.asarray, data)
    folder = pathlib.Path(work) / f"{name}-seed{seed}-{seconds:g}s"

    def run(num_steps: int, chunk: int):
        own = dataclasses.replace(config, num_steps=num_steps)
        learner = artifacts.build(artifacts.describe(kind, own, spec))
        times = []
        state, _ = loops.fit(
            jax.random.key(1000 + seed),
            learner,
            learner.init(jax.random.key(seed), scales),
            lambda key, rows: sample_windows(key, rows, batch, lags),
            num_steps,
            data=arrays,
            chunk=chunk,
            on_chunk=lambda *_: times.append(time.process_time()),
        )
        return learner, state.params, np.diff(times)

    if (folder / "cost.json").exists():
        cost = artifacts.read_json(folder / "cost.json")
        own = dataclasses.replace(config, num_steps=int(cost["steps"]))
        learner = artifacts.build(artifacts.describe(kind, own, spec))
        like = jax.eval_shape(learner.init, jax.random.key(0), scales).params
        return Model(learner.model, artifacts.restore(folder, like)), cost
    trial = 10 if getattr(config, "negatives", "") == "langevin" else 250
    per_chunk = run(4 * trial, trial)[2]
    # The head trains alone in the first chunks, with the energy in the last one.
    first, last = per_chunk[0] / trial, per_chunk[-1] / trial
    share = getattr(config, "head_phase", 1.0)
    steps = seconds / (share * first + (1 - share) * last)
    chunk = max(int(steps / 20), 1)
    learner, params, times = run(20 * chunk, chunk)
    cost = {
        "steps": 20 * chunk,
        "cpu_seconds": float(times.sum() * 20 / 19),
        "ms_per_step": float(1e3 * times.mean() / chunk),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params[1:])),
    }
    artifacts.save(folder, 0, params)
    artifacts.write_json(folder / "cost.json", cost)
    print(f"{name}, seed {seed}: {cost}", flush=True)
    return Model(learner.model, params), cost


def with_steps(model: Model, num_steps: int) -> Model:
    """The same energy, refined by another number of chain steps."""
    sampling = SamplingConfig(num_steps=num_steps)
    return Model(transition_model(model.model.expert, sampling), model.params)


def better(model: Model, domain: Domain, unit: jax.Array) -> tuple[Model, int]:
    """The better predictor on validation rows: the head's mean or the refined mode."""
    options = {steps: with_steps(model, steps) for steps in (0, 3)}

    def error(option: Model) -> float:
        measured = Measured(option.model, option.params, unit, lags=LAGS)
        return measured.one_step(domain.validation).rms

    best = min(options, key=lambda steps: error(options[steps]))
    return options[best], best


def study(config: QualityConfig, seed: int, domains: list[Domain]) -> dict[str, Any]:
    """All numbers of one seed."""
    unit = pooled_unit(domains)
    union = concatenate([domain.train for domain in domains])
    adetm, mlp = AdetmConfig(), EnsembleConfig(num_members=1)
    langevin = AdetmConfig(
        negatives="langevin", num_negatives=16, energy_sizes=(192, 192), batch_size=64
    )
    costs: dict[str, Any] = {}

    def make(name: str, kind: str, own: Any, data: Any, factor: float = 1.0) -> Model:
        model, costs[name] = train(
            name, kind, own, data, factor * config.seconds, seed, config.work
        )
        return model

    per_domain = [(i, domain.train) for i, domain in enumerate(domains)]
    experts = [make(f"expert-{i}", "adetm", adetm, d) for i, d in per_domain]
    mlps = [make(f"mlp-{i}", "ensemble", mlp, d) for i, d in per_domain]
    fives: list[Model] = []
    chains: list[Model] = []
    if config.baselines:
        fives = [
            make(f"ensemble-{i}", "ensemble", EnsembleConfig(), d)
            for i, d in per_domain
        ]
        chains = [make(f"langevin-{i}", "adetm", langevin, d) for i, d in per_domain]
        quick = dataclasses.replace(ETM_SAMPLING, uncertainty_steps=0)
        chains = [
            Model(transition_model(c.model.expert, quick), c.params) for c in chains
        ]
    oracle = make("oracle-1", "adetm", adetm, union)
    oracle_all = make("oracle-n", "adetm", adetm, union, float(len(domains)))

    result: dict[str, Any] = {"seed": seed, "costs": costs}
    result |= _errors(experts, mlps, chains, oracle, oracle_all, domains, unit)
    result["nll"] = _likelihoods(experts, chains, domains, unit)
    result["uncertainty"] = _uncertainty(experts, fives, domains, unit)
    return result


def _fused(experts: list[Model], rule: Any, num_steps: int = 3) -> Model:
    sampling = SamplingConfig(num_steps=num_steps)
    model = fuse_dynamics(experts[0].model, rule, sampling=sampling)
    return Model(model, stack([expert.params for expert in experts]))


def _errors(
    experts: list[Model],
    mlps: list[Model],
    chains: list[Model],
    oracle: Model,
    oracle_all: Model,
    domains: list[Domain],
    unit: jax.Array,
) -> dict[str, Any]:
    chosen = [better(e, d, unit) for e, d in zip(experts, domains, strict=True)]
    everything = domains[0]._replace(
        validation=concatenate([domain.validation for domain in domains])
    )
    models = {
        **{f"expert-{i}": model for i, (model, _) in enumerate(chosen)},
        **{f"mlp-{i}": model for i, model in enumerate(mlps)},
        **{f"langevin-{i}": model for i, model in enumerate(chains)},
        "fused-uncertainty": _fused(experts, uncertainty_weights()),
        "fused-uncertainty-heads": _fused(experts, uncertainty_weights(), 0),
        "fused-uniform": _fused(experts, None),
        "oracle-1": better(oracle, everything, unit)[0],
        "oracle-n": better(oracle_all, everything, unit)[0],
    }
    table = {}
    for name, model in models.items():
        # Ten chained predictions of fifty steps each would cost more than the training.
        k_step = not name.startswith("langevin")
        table[name] = quality.errors(model, domains, unit, LAGS, k_step=k_step)
    n = len(domains)
    own = np.mean([table[f"expert-{i}"]["one_step"][i] for i in range(n)])
    mlp = np.mean([table[f"mlp-{i}"]["one_step"][i] for i in range(n)])

    def mean(name: str, k: str | None = None) -> float:
        if k is None:
            return float(np.mean(table[name]["one_step"]))
        return float(np.mean([row[k] for row in table[name]["k_step"]]))

    single = np.mean([mean(f"expert-{i}") for i in range(n)])
    ratios = {"own / mlp": float(own / mlp)}
    for rule in ("uncertainty", "uniform"):
        ratios[f"{rule} / single"] = mean(f"fused-{rule}") / float(single)
        ratios[f"{rule} / oracle-1"] = mean(f"fused-{rule}") / mean("oracle-1")
        ratios[f"{rule} / oracle-n"] = mean(f"fused-{rule}") / mean("oracle-n")
        for k in ("1", "5", "10"):
            singles = float(np.mean([mean(f"expert-{i}", k) for i in range(n)]))
            ratios[f"{rule} / single, k={k}"] = mean(f"fused-{rule}", k) / singles
            ratios[f"{rule} / oracle-1, k={k}"] = mean(f"fused-{rule}", k) / mean(
                "oracle-1", k
            )
    return {
        "errors": table,
        "ratios": ratios,
        "refined": [steps for _, steps in chosen],
    }


def _likelihoods(
    experts: list[Model], chains: list[Model], domains: list[Domain], unit: jax.Array
) -> dict[str, Any]:
    one = jnp.ones((1, 150))
    weights = jnp.full((len(experts), 150), 1.0 / len(experts))
    rows: dict[str, Any] = {"head": [], "proposal": [], "fused": []}
    if chains:
        rows["langevin"] = []
    for index, domain in enumerate(domains):
        own = experts[index]
        rows["head"].append(quality.head_nll(own, domain, unit, LAGS))
        rows["proposal"].append(quality.nll(own, [own], one, domain, unit, LAGS))
        if chains:
            # The energy of the chains spreads over its box; the head's part would miss that.
            wide = quality.nll(
                chains[index],
                [own],
                one,
                domain,
                unit,
                LAGS,
                draws=20_000,
                scales=(1.0, 8.0, 64.0),
            )
            rows["langevin"].append(wide)
        fused = _fused(experts, uncertainty_weights())
        # The pool is narrower than its experts where they agree and wider where not.
        pooled = quality.nll(
            fused,
            experts,
            weights,
            domain,
            unit,
            LAGS,
            draws=20_000,
            scales=(0.25, 0.5, 1.0, 2.0, 4.0),
        )
        rows["fused"].append(pooled)
    return rows


def _uncertainty(
    experts: list[Model], fives: list[Model], domains: list[Domain], unit: jax.Array
) -> dict[str, Any]:
    n = len(domains)
    single, fused = [], []

    def one_step(model: Model) -> list[Any]:
        measured = Measured(model.model, model.params, unit, lags=LAGS)
        return [measured.one_step(domain.test) for domain in domains]

    def parts(values: list[Any], inside: list[int]) -> tuple[list[Any], list[Any]]:
        return [values[i] for i in inside], [
            values[i] for i in range(n) if i not in inside
        ]

    spreads = [one_step(five) for five in fives]
    sigma = [[quality.head_spread(e, d.test, LAGS) for d in domains] for e in experts]
    for i, expert in enumerate(experts):
        inside, outside = parts(one_step(with_steps(expert, 0)), [i])
        scores = {"head_sigma": parts(sigma[i], [i])}
        if fives:
            spread = [row.uncertainty for row in spreads[i]]
            scores["ensemble_spread"] = parts(spread, [i])
        single.append(quality.rankings(inside, outside, scores))
    for pair in itertools.combinations(range(n), n - 1):
        model = _fused([experts[i] for i in pair], uncertainty_weights())
        inside, outside = parts(one_step(model), list(pair))
        values = {"head_sigma": [sigma[i] for i in pair]}
        if fives:
            values["ensemble_spread"] = [
                [row.uncertainty for row in spreads[i]] for i in pair
            ]
        scores = {
            name: parts(
                [np.mean(rows, axis=0) for rows in zip(*value, strict=True)], list(pair)
            )
            for name, value in values.items()
        }
        fused.append(quality.rankings(inside, outside, scores))
    test = domains[0].test
    rates = {
        "slices": quality.milliseconds_per_10k(
            experts[0].model.uncertainty, experts[0].params, test, LAGS
        ),
        "fused_slices": quality.milliseconds_per_10k(
            _fused(experts, uncertainty_weights()).model.uncertainty,
            stack([expert.params for expert in experts]),
            test,
            LAGS,
        ),
    }
    if fives:
        rates["ensemble"] = quality.milliseconds_per_10k(
            fives[0].model.uncertainty, fives[0].params, test, LAGS
        )
    return {"single": single, "fused": fused, "ms_per_10k_rows": rates}


def main(config: QualityConfig) -> None:
    """Runs the study and writes its JSON after every seed."""
    require(config, "data")
    domains = load_domains(config.data, min_length=LAGS)
    seeds = []
    for seed in config.seeds:
        seeds.append(study(config, seed, domains))
        result = {
            "provenance": artifacts.provenance(),
            "config": artifacts.to_json(config),
            "seeds": seeds,
            "summary": summarise(seeds),
        }
        path = pathlib.Path(config.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(path, portable(result))
        for name, value in result["summary"].items():
            print(f"{name}: {value}", flush=True)


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds (and domains or experts)."""
    summary: dict[str, Any] = {
        name: float(np.mean([seed["ratios"][name] for seed in seeds]))
        for name in seeds[0]["ratios"]
    }
    for kind in ("single", "fused"):
        for score in seeds[0]["uncertainty"][kind][0]:
            for measure in ("spearman", "auroc"):
                values = [
                    row[score][measure] for s in seeds for row in s["uncertainty"][kind]
                ]
                summary[f"{kind} {score} {measure}"] = float(np.mean(values))
    # Two kinds of negatives for equal CPU time; the NLL of either stands below.
    for kind in ("expert", "langevin", "ensemble"):
        costs = [
            cost
            for seed in seeds
            for name, cost in seed["costs"].items()
            if name.startswith(kind)
        ]
        if costs:
            rate = np.mean([cost["ms_per_step"] for cost in costs])
            summary[f"{kind} ms per step"] = float(rate)
    for kind in ("expert", "langevin"):
        own = [
            row["one_step"][int(name.removeprefix(f"{kind}-"))]
            for seed in seeds
            for name, row in seed["errors"].items()
            if name.startswith(kind)
        ]
        if own:
            summary[f"{kind} own one-step error"] = float(np.mean(own))
    for name in seeds[0]["nll"]:
        summary[f"nll {name}"] = float(
            np.mean([row["nll"] for seed in seeds for row in seed["nll"][name]])
        )
    return summary


if __name__ == "__main__":
    sys.exit(run_main(main, QualityConfig))
