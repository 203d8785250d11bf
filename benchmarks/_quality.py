"""Measures of `model_quality`: errors, likelihoods and rankings of trained models."""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax.base import History, TransitionModel
from emfuse_jax.data import Dataset, gather_history
from emfuse_jax.dynamics import make_slices, pack_target
from emfuse_jax.evaluation.fidelity import (
    auroc,
    log_partition,
    negative_log_likelihood,
    spearman,
)
from emfuse_jax.losses import gaussian_mixture_proposal
from experiments._measure import Domain, Measured, OneStep, spaced_rows


class Model(NamedTuple):
    """A transition model with its parameters."""

    model: TransitionModel
    params: Any


def errors(
    model: Model,
    domains: Sequence[Domain],
    unit: jax.Array,
    lags: int,
    *,
    k_step: bool = True,
) -> dict[str, list]:
    """One-step and k-step errors by domain."""
    measured = Measured(model.model, model.params, unit, lags=lags)
    table = {"one_step": [measured.one_step(domain.test).rms for domain in domains]}
    if k_step:
        table["k_step"] = [measured.k_step(domain.test) for domain in domains]
    return table


def proposal(model: Model, experts: Sequence[Model], history: History, weights: Any):
    """A Gaussian near the model's targets: its own start, the experts' mean spread."""
    predicted = model.model.predict(model.params, jax.random.key(0), history)
    slices = make_slices(history, experts[0].model.expert.anchor)
    scales = [e.model.expert.encode(e.params, slices).scale[0] for e in experts]
    scale = jnp.einsum("mb,mbd->bd", weights, jnp.stack(scales))
    mean = pack_target(slices.anchor[0], predicted.next_observation, predicted.reward)
    return mean, scale


def nll(
    model: Model,
    experts: Sequence[Model],
    weights: Any,
    domain: Domain,
    unit: jax.Array,
    lags: int,
    *,
    rows: int = 150,
    draws: int = 2000,
    scales: tuple[float, ...] = (0.5, 1.0, 2.0),
) -> dict[str, float]:
    """Held-out nats per row, targets in pooled units, by importance sampling.

    Args:
        model: whose energy is measured.
        experts: whose heads make the proposal.
        weights: ``[expert, rows]`` of the proposal.
        domain: held-out rows.
        unit: of the observation's dimensions (the reward keeps its own).
        lags: history that the models read.
        rows: how many rows.
        draws: per row; a tenth of them from the box of the data.
        scales: of the Gaussian part, in units of the experts' spread.
    """
    index = spaced_rows(domain.test, rows, before=lags)
    history = gather_history(domain.test, index, lags)
    mean, scale = proposal(model, experts, history, weights[:, : len(index)])
    everything = np.concatenate(
        [
            domain.train.next_observation - domain.train.observation,
            domain.train.reward[:, None],
        ],
        axis=1,
    )
    box = (jnp.asarray(everything.min(0)), jnp.asarray(everything.max(0)))
    target, log_q = gaussian_mixture_proposal(
        jax.random.key(1), mean, scale, scales, draws, box=box, box_weight=0.1
    )
    anchor = history.observation[0]

    @jax.jit
    def energy_of(params: Any, target: jax.Array) -> jax.Array:
        def one(y: jax.Array) -> jax.Array:
            return model.model.energy(params, history, anchor + y[:, :-1], y[:, -1])

        return jax.lax.map(one, target, batch_size=50)

    energy = energy_of(model.params, jnp.moveaxis(target, 1, 0)).T
    truth = pack_target(
        anchor,
        jnp.asarray(domain.test.next_observation[index]),
        jnp.asarray(domain.test.reward[index]),
    )
    estimate = log_partition(energy, log_q)
    value = negative_log_likelihood(
        energy_of(model.params, truth[None])[0], estimate.log_partition
    )
    value = value - jnp.sum(jnp.log(unit))
    return {
        "nll": float(jnp.mean(value)),
        "standard_error": float(jnp.std(value) / np.sqrt(len(index))),
        "median_effective_draws": float(jnp.median(estimate.effective_sample_size)),
        "least_effective_draws": float(jnp.min(estimate.effective_sample_size)),
        "draws": draws,
    }


def head_nll(
    expert: Model, domain: Domain, unit: jax.Array, lags: int
) -> dict[str, float]:
    """Held-out nats per row of the Gaussian head, exact."""
    index = spaced_rows(domain.test, 1500, before=lags)
    history = gather_history(domain.test, index, lags)
    slices = make_slices(history, expert.model.expert.anchor)
    encoded = expert.model.expert.encode(expert.params, slices)
    truth = pack_target(
        slices.anchor[0],
        jnp.asarray(domain.test.next_observation[index]),
        jnp.asarray(domain.test.reward[index]),
    )
    residual = (truth - encoded.start[0]) / encoded.scale[0]
    per_dim = 0.5 * jnp.square(residual) + jnp.log(encoded.scale[0])
    value = jnp.sum(per_dim + 0.5 * jnp.log(2 * jnp.pi), axis=-1) - jnp.sum(
        jnp.log(unit)
    )
    return {"nll": float(jnp.mean(value))}


def rankings(
    inside: Sequence[OneStep], outside: Sequence[OneStep], scores: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Spearman with the error and AUROC(in / out) of each score on a 50/50 mixture.

    Args:
        inside: rows of the model's own domains.
        outside: rows of the others.
        scores: by name, ``([inside rows …], [outside rows …])``; ``uncertainty``,
            ``minimum_energy`` and ``true_error`` are added from the rows.
    """
    scores = {
        "uncertainty": (
            [r.uncertainty for r in inside],
            [r.uncertainty for r in outside],
        ),
        "minimum_energy": ([r.energy for r in inside], [r.energy for r in outside]),
        "true_error": ([r.error for r in inside], [r.error for r in outside]),
        **scores,
    }
    total = min(sum(len(r.error) for r in part) for part in (inside, outside))

    def mixture(parts: tuple[Any, Any]) -> jax.Array:
        halves = []
        for half in parts:
            joined = np.concatenate(half)
            halves.append(joined[np.linspace(0, len(joined) - 1, total).astype(int)])
        return jnp.concatenate([jnp.asarray(half) for half in halves])

    out = jnp.arange(2 * total) >= total
    error = mixture(scores["true_error"])
    return {
        name: {
            "spearman": float(spearman(mixture(parts), error)),
            "auroc": float(auroc(mixture(parts), out)),
        }
        for name, parts in scores.items()
    }


def head_spread(expert: Model, test: Dataset, lags: int) -> np.ndarray:
    """Root mean square of the head's σ, in units of the expert's one-step scale."""
    index = spaced_rows(test, 1500, before=lags)
    slices = make_slices(gather_history(test, index, lags), expert.model.expert.anchor)
    scale = expert.model.expert.encode(expert.params, slices).scale[0, :, :-1]
    unit = expert.model.expert.unit(expert.params)
    return np.asarray(jnp.sqrt(jnp.mean(jnp.square(scale / unit[None]), axis=-1)))


def milliseconds_per_10k(fn: Any, params: Any, test: Dataset, lags: int) -> float:
    """CPU time of ``fn(params, history)`` on 10 000 rows, the median of five."""
    index = np.resize(spaced_rows(test, 1500, before=lags), 10_000)
    history = gather_history(test, index, lags)
    run = jax.jit(functools.partial(fn))
    jax.block_until_ready(run(params, history))
    times = []
    for _ in range(5):
        before = time.process_time()
        jax.block_until_ready(run(params, history))
        times.append(1e3 * (time.process_time() - before))
    return float(np.median(times))
