r"""Does MC-ETM pass its acceptance list on a curve in the plane, and which term does what?

    python -m benchmarks.mcetm_curve --output=benchmarks/results/mcetm_curve.json

Trains every variant with all seeds as one program (`benchmarks._curve` has the law and the
measures) and holds each seed's numbers against the limits below. Variants: MC-ETM; without
its near-manifold negatives; without its cross negatives; ETM itself.
"""

import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _curve
from benchmarks._timing import portable
from emfuse_jax import artifacts, loops
from emfuse_jax.base import Dynamics
from emfuse_jax.dynamics import CandidateConfig, EtmConfig, McetmConfig, etm, fit_scales
from emfuse_jax.dynamics.mcetm import mcetm, near_manifold
from experiments._progress import Progress
from experiments._run import run_main

MCETM = McetmConfig(num_steps=5_000, head_phase=0.25, batch_size=64, manifold_rows=64)
CANDIDATES = CandidateConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """Settings of the study.

    Attributes:
        mcetm: the recipe.
        seeds: of weights, batches and measures.
        variants: which to train; the first is held against the limits.
        candidates: of the least energy.
        output: the JSON file to write.
        smoke: tiny sizes, to see that everything runs.
    """

    mcetm: McetmConfig = MCETM
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: tuple[str, ...] = ("mcetm", "no_manifold", "no_cross", "etm")
    candidates: CandidateConfig = CANDIDATES
    output: str = ""
    smoke: bool = False


LIMITS = {
    "i monotone": ("monotone", ">=", 0.95),
    "ii paired at .05": ("paired_0.05", ">=", 0.90),
    "ii paired at .1": ("paired_0.1", ">=", 0.99),
    "iii along": ("along", ">=", 0.98),
    "iv std at the mode": ("mode_std", "<=", 1.0),
    "v OOD AUC": ("ood_auc", ">=", 0.9),
    "v truncated inside, off nominal": ("truncation_error", "<=", 0.02),
    "vi decoded distance": ("decoded_distance", "<=", 2 * _curve.NORMAL),
    "vii mean to curve": ("mean_to_curve", "<=", 0.02),
    "vii std along, off by": ("along_std_error", "<=", 0.2),
}


def variant(name: str, config: McetmConfig) -> tuple[Dynamics, Any]:
    """A learner and its config."""
    if name == "etm":
        names = {f.name for f in dataclasses.fields(EtmConfig)}
        own = EtmConfig(**{n: getattr(config, n) for n in names})
        return etm(own, _curve.SPEC), own
    off = {"mcetm": {}, "no_manifold": {"manifold_weight": 0.0}}
    off["no_cross"] = {"cross_weight": 0.0}
    if name not in off:
        raise ValueError(f"variant {name!r}; expected one of {[*off, 'etm']}")
    own = dataclasses.replace(config, **off[name])
    return mcetm(own, _curve.SPEC), own


def train(config: CurveConfig, name: str) -> tuple[Dynamics, Any, dict[str, float]]:
    """All seeds at once; params lead with the seed axis."""
    learner, own = variant(name, config.mcetm)
    scales = fit_scales(
        _curve.dataset_of(_curve.draw(jax.random.key(99), 20_000)),
        1,
        anchor="current",
        target=own.target_scale,
    )
    keys = jax.vmap(jax.random.key)(jnp.asarray(config.seeds))
    state = jax.jit(jax.vmap(learner.init, in_axes=(0, None)))(keys, scales)
    chunk = max(own.num_steps // 20, 1)
    before = time.process_time()
    with Progress(own.num_steps, description=name) as bar:
        state, _ = loops.fit(
            jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys),
            learner,
            state,
            lambda key, data: _curve.batch_of(_curve.draw(key, own.batch_size)),
            own.num_steps,
            chunk=chunk,
            on_chunk=lambda step, *_: bar.update(step) and None,
        )
    return learner, state.params, {"cpu_seconds": time.process_time() - before}


def measured(
    config: CurveConfig, name: str, learner: Dynamics, params: Any, sizes: Any
) -> list[dict[str, Any]]:
    """One row per seed."""
    measure = _curve.measures(learner.model, sizes, config.candidates)
    _, own = variant(name, config.mcetm)
    negatives = jax.jit(lambda *args: near_manifold(own, _curve.SPEC, *args))
    rows = []
    for index, seed in enumerate(config.seeds):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], params)
        key_measure, key_negative, key_rows = jax.random.split(
            jax.random.key(1000 + seed), 3
        )
        row = measure(one, key_measure)
        for part in ("paired", "pooled"):
            values = row.pop(part)
            row |= {
                f"{part}_{o:g}": v for o, v in zip(_curve.OFFSETS, values, strict=True)
            }
        row["truncation_error"] = abs(row["truncated_inside"] - 0.05)
        row["along_std_error"] = abs(row["along_std_ratio"] - 1.0)
        if name != "etm":
            batch = _curve.batch_of(_curve.draw(key_rows, sizes.rows))
            found = negatives(one, key_negative, batch)
            scale = jax.tree.map(lambda leaf: leaf[0], one.scales.target)
            row["decoded_distance"] = _curve.decoded_distance(found.decoded, scale)
            row["visible_distance"] = _curve.decoded_distance(found.visible, scale)
        rows.append({"seed": seed, **row})
    return rows


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each limit, the seeds' values and how many of them pass."""
    table = {}
    for name, (field, sense, limit) in LIMITS.items():
        values = [row[field] for row in rows if field in row]
        passed = [v >= limit if sense == ">=" else v <= limit for v in values]
        table[name] = {
            "limit": f"{sense} {limit:g}",
            "values": values,
            "passed": f"{sum(passed)}/{len(passed)}",
        }
    return table


def study(config: CurveConfig) -> dict[str, Any]:
    """Trains and measures every variant; writes the JSON."""
    sizes = _curve.Sizes()
    if config.smoke:
        small = dataclasses.replace(
            config.mcetm,
            num_steps=20,
            energy_sizes=(8, 8),
            head_sizes=(8,),
            autoencoder_sizes=(8,),
            batch_size=16,
            energy_rows=8,
            manifold_rows=8,
        )
        config = dataclasses.replace(
            config,
            mcetm=small,
            seeds=config.seeds[:2],
            variants=("mcetm",),
            candidates=dataclasses.replace(config.candidates, num_candidates=2),
        )
        sizes = _curve.Sizes(40, 4, 4, 4, 8)
    variants = {}
    for name in config.variants:
        learner, params, cost = train(config, name)
        rows = measured(config, name, learner, params, sizes)
        variants[name] = {**cost, "seeds": rows, "verdict": verdict(rows)}
        print(f"{name}: {cost['cpu_seconds']:.0f} CPU seconds", flush=True)
        for line, entry in variants[name]["verdict"].items():
            values = " ".join(f"{v:.3f}" for v in entry["values"])
            print(f"  {line} {entry['limit']}: {entry['passed']}  [{values}]")
        for extra in (
            "ood_auc_tripled",
            "truncated_outside",
            "mean_error",
            "law_to_curve",
            "sample_distance",
            "monotone_least",
        ):
            print(f"  {extra}: {np.mean([row[extra] for row in rows]):.3f}")
        if config.output:
            result = {
                "provenance": artifacts.provenance(),
                "config": artifacts.to_json(config),
                "variants": variants,
            }
            path = pathlib.Path(config.output)
            path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_json(path, portable(result))
    return variants


if __name__ == "__main__":
    sys.exit(run_main(study, CurveConfig))
