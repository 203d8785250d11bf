"""Truncation by least energy and candidates of next states, for the command lines."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from emfuse_jax import artifacts
from emfuse_jax.base import History, TransitionModel
from emfuse_jax.data import Dataset, gather_history
from emfuse_jax.dynamics import (
    Calibration,
    CandidateConfig,
    SamplingConfig,
    calibrate,
    candidates,
    min_energy_model,
)
from experiments._measure import spaced_rows

CALIBRATION_FILE = "calibration.json"
DISPERSION = SamplingConfig(
    num_steps=5, spread=1.0, margin=4.0, first=0.1, last=0.02, temperature=1.0
)
"""Draws near the energy's own law, for the dispersion of values."""


def with_sampling(trained: artifacts.Trained) -> Callable[..., TransitionModel]:
    """``sampling -> model``: what a run holds, predicting by another chain."""

    def build(sampling: SamplingConfig) -> TransitionModel:
        own = {**trained.description["config"], "sampling": artifacts.to_json(sampling)}
        built = artifacts.build({**trained.description, "config": own})
        return built if trained.learner is None else built.model

    return build


def write_calibration(
    path: pathlib.Path,
    trained: artifacts.Trained,
    held_out: Dataset,
    config: CandidateConfig,
    quantile: float,
) -> Calibration:
    """Calibrates on held-out rows and writes the result into the run directory."""
    lags = trained.model.expert.num_lags
    rows = spaced_rows(held_out, 2000, before=lags - 1)
    calibration = calibrate(
        with_sampling(trained),
        config,
        trained.params,
        gather_history(held_out, rows, lags),
        quantile=quantile,
        model=artifacts.tree_digest(trained.params),
    )
    artifacts.write_json(path / CALIBRATION_FILE, artifacts.to_json(calibration))
    return calibration


def read_calibration(path: str | pathlib.Path) -> Calibration:
    """The calibration of a run directory.

    Raises:
        FileNotFoundError: if it has none.
    """
    file = pathlib.Path(path) / CALIBRATION_FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{path} has no {CALIBRATION_FILE}, so that no least energy is known to be "
            "too high; train with train_dynamics --model=mcetm, fuse such runs alone, or "
            "give --cut=uncertainty"
        )
    return artifacts.from_json(
        Calibration, artifacts.read_json(file), where=CALIBRATION_FILE
    )


def truncated_model(
    path: str | pathlib.Path, trained: artifacts.Trained, config: CandidateConfig
) -> tuple[TransitionModel, float]:
    """The model that moves by its best candidate, and the least energy to cut above.

    Raises:
        FileNotFoundError: if the run has no calibration.
        ValueError: if that was made with another sampler than ``config``.
    """
    calibration = read_calibration(path)
    model = min_energy_model(
        with_sampling(trained),
        config,
        calibration=calibration,
        model=artifacts.tree_digest(trained.params),
    )
    return model, calibration.threshold


def candidates_fn(
    trained: artifacts.Trained, num_candidates: int
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Next observations ``[candidate, rows, obs]`` for `model_based`."""
    config = CandidateConfig(num_candidates=num_candidates, sampling=DISPERSION)
    draw = candidates(with_sampling(trained)(config.chains), num_candidates)
    lags = trained.model.expert.num_lags

    def following(
        params: Any, key: jax.Array, observation: jax.Array, action: jax.Array
    ) -> jax.Array:
        def newest(x: jax.Array) -> jax.Array:
            return jnp.concatenate([x[None], jnp.zeros((lags - 1, *x.shape))])

        # A stored row knows no past: longer slices are not valid.
        valid = newest(jnp.ones(observation.shape[:-1])) > 0
        history = History(newest(observation), newest(action), valid)
        return draw(params, key, history).next_observation

    return following
