r"""Trains one dynamics model on one data set, or on the union of several.

    python -m experiments.train_dynamics --data=data/hopper.hdf5 --run_dir=runs/expert
    python -m experiments.train_dynamics --data=a.hdf5,b.hdf5 --run_dir=runs/mixed \
        --preset=paper
    python -m experiments.train_dynamics --model=mcetm --data=data/hopper.hdf5 \
        --run_dir=runs/mcetm

The last tenth of each data set's episodes is held out for test and the 5 % before it for
validation, which chooses the checkpoint and, for mcetm, the least energy above which
rollouts are cut (``calibration.json``). Rerun with the same flags to resume.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from emfuse_jax import artifacts
from emfuse_jax.base import SpaceSpec
from emfuse_jax.data import Dataset, concatenate, gather_history
from emfuse_jax.dynamics import (
    AdetmConfig,
    Batch,
    CandidateConfig,
    EnsembleConfig,
    EtmConfig,
    McetmConfig,
    fit_scales,
    sample_windows,
)
from emfuse_jax.evaluation.fidelity import rms_error
from experiments import presets
from experiments._measure import (
    Domain,
    Measured,
    check_held_out,
    load_domains,
    pooled_unit,
    require,
    spaced_rows,
)
from experiments._run import Run, open_run, run_main
from experiments._truncation import write_calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainDynamicsConfig:
    """Settings of one model.

    Attributes:
        data: HDF5 files or Minari ids; several are trained on together.
        run_dir: where everything goes.
        model: adetm (any-step), etm (one-step), mcetm (one-step, which knows where its
            data are) or ensemble (Gaussian).
        adetm: settings of the any-step energy model.
        etm: settings of the one-step energy model.
        mcetm: settings of the manifold-constrained energy model.
        ensemble: settings of the Gaussian ensemble.
        candidates: mcetm: the sampler that its threshold is calibrated for.
        quantile: mcetm: share of held-out rows below the threshold.
        seed: of weights and batches.
        chunk: updates per compiled call and row of metrics.
        save_every: chunks per validation and checkpoint.
    """

    data: tuple[str, ...] = ()
    run_dir: str = ""
    model: Literal["adetm", "etm", "mcetm", "ensemble"] = "adetm"
    adetm: AdetmConfig = AdetmConfig()  # noqa: RUF009
    etm: EtmConfig = EtmConfig()  # noqa: RUF009
    mcetm: McetmConfig = McetmConfig()  # noqa: RUF009
    ensemble: EnsembleConfig = EnsembleConfig()  # noqa: RUF009
    candidates: CandidateConfig = CandidateConfig()  # noqa: RUF009
    quantile: float = 0.99
    seed: int = 0
    chunk: int = 1000
    save_every: int = 2

    def __post_init__(self) -> None:
        if not 0.0 < self.quantile < 1.0:
            raise ValueError(f"quantile={self.quantile} must be between 0 and 1")
        steps = self.chosen.num_steps
        if min(steps, self.chunk, self.save_every) < 1 or steps % min(
            self.chunk, steps
        ):
            raise ValueError(
                f"{self.model}.num_steps={steps} must be a multiple of chunk={self.chunk} "
                f"(or below it), and save_every={self.save_every} at least 1"
            )

    @property
    def chosen(self) -> Any:
        """The config of the chosen model."""
        return getattr(self, self.model)


PRESETS = {
    name: functools.partial(
        TrainDynamicsConfig,
        adetm=presets.adetm(name),
        etm=presets.etm(name),
        mcetm=presets.mcetm(name),
    )
    for name in presets.NAMES
}


def train(config: TrainDynamicsConfig) -> dict[str, Any]:
    """Trains, writes ``result.json`` and returns what it holds."""
    require(config, "data", "run_dir")
    chosen = config.chosen
    lags = getattr(chosen, "num_lags", 1)
    domains = load_domains(config.data, min_length=1)
    rows = concatenate([domain.train for domain in domains])
    spec = SpaceSpec(rows.observation.shape[1], rows.action.shape[1])
    scales = fit_scales(
        rows,
        lags,
        anchor=getattr(chosen, "anchor", "current"),
        target=getattr(chosen, "target_scale", "standard"),
    )
    description = artifacts.describe(config.model, chosen, spec)
    learner = artifacts.build(description)
    check_held_out(domains, lags)
    evaluate = _validation(learner, domains, lags)
    # Nothing may fail for its input from here on: the directory would be left behind.
    with open_run(
        config.run_dir, config, kind="train_dynamics", seed=config.seed
    ) as run:
        artifacts.write_description(run.path, description)
        key_init, key_fit = jax.random.split(jax.random.key(config.seed))
        with run.stage("train"):
            state = jax.jit(learner.init)(key_init, scales)
            _fit(run, config, learner, state, key_fit, rows, evaluate)
        return _finish(run, config, domains, lags)


def _fit(
    run: Run,
    config: TrainDynamicsConfig,
    learner: Any,
    state: Any,
    key: jax.Array,
    rows: Dataset,
    evaluate: Callable[..., Any],
) -> None:
    chosen = config.chosen
    lags = getattr(chosen, "num_lags", 1)
    rows_per_batch = chosen.batch_size * getattr(chosen, "num_members", 1)
    run.fit(
        key,
        learner,
        state,
        lambda k, data: sample_windows(k, data, rows_per_batch, lags),
        chosen.num_steps,
        data=jax.tree.map(jnp.asarray, rows),
        chunk=min(config.chunk, chosen.num_steps),
        save_every=config.save_every,
        evaluate=evaluate,
        description=f"train {config.model}",
        batch_axes=Batch(history=1, reward=0, next_observation=0),
    )


def _validation(
    learner: Any, domains: list[Domain], lags: int
) -> Callable[[int, Any], dict[str, float]]:
    """One-step error on held-out validation rows; its negative chooses the checkpoint."""
    validation = concatenate([domain.validation for domain in domains])
    unit = pooled_unit(domains)
    rows = spaced_rows(validation, 1000, before=lags)
    history = gather_history(validation, rows, lags)
    target = jnp.asarray(validation.next_observation[rows])

    @jax.jit
    def error(params: Any, history: Any, target: Any) -> Any:
        predicted = learner.model.predict(params, jax.random.key(0), history)
        return rms_error(predicted.next_observation, target, unit)

    def evaluate(step: int, state: Any) -> dict[str, float]:
        del step
        value = float(error(state.params, history, target))
        return {"validation_rms": value, "score": -value}

    return evaluate


def _finish(
    run: Run, config: TrainDynamicsConfig, domains: list[Domain], lags: int
) -> dict[str, Any]:
    trained = artifacts.load_run(run.path)
    measured = Measured(trained.model, trained.params, pooled_unit(domains), lags=lags)
    result = {
        "model": config.model,
        "data": list(config.data),
        "best_step": trained.step,
        "test_rms": {d.name: measured.one_step(d.test).rms for d in domains},
        "cpu_seconds": run.seconds("train, cpu"),
    }
    if config.model == "mcetm":
        held_out = concatenate([domain.validation for domain in domains])
        calibration = write_calibration(
            run.path, trained, held_out, config.candidates, config.quantile
        )
        result["truncate_above"] = calibration.threshold
    run.write_json("result.json", result)
    for name, value in result["test_rms"].items():
        print(f"{name}: held-out one-step error {value:.4f} (pooled std of Δs)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_main(
        train,
        TrainDynamicsConfig,
        argv,
        presets=PRESETS,
        default_preset="fast",
        trains=True,
        shares=True,
    )


if __name__ == "__main__":
    sys.exit(main())
