"""Held-out likelihoods of one expert's energy, by importance sampling in two stages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._quality import Model
from emfuse_jax.base import History
from emfuse_jax.data import gather_history
from emfuse_jax.dynamics import Expert, make_slices, pack_target
from emfuse_jax.evaluation.fidelity import LogPartition, log_partition
from emfuse_jax.losses import gaussian_mixture_proposal
from experiments._measure import Domain, spaced_rows

Box = tuple[jax.Array, jax.Array]
WIDE = (0.3, 1.0, 3.0)
"""Standard deviations of the first stage, in units of the expert's own."""
NEAR = (1.0, 1.5, 2.5)
"""Those of the second, in units of the first stage's moments."""
BOX_WEIGHT = 0.1


class Landscape(NamedTuple):
    """One row's energy over raw targets, and where to begin."""

    energy: Any
    """``[draw, dim] -> [draw]``."""
    start: jax.Array
    scale: jax.Array


def landscape(
    expert: Expert, params: Any, history: History, bounds: Box | None
) -> Landscape:
    """The energy of a single history (leaves ``[lag, …]``), infinite outside ``bounds``."""
    one = jax.tree.map(lambda leaf: leaf[:, None], history)
    encoded = expert.encode(params, make_slices(one, expert.anchor))
    newest = jax.tree.map(lambda leaf: leaf[0], encoded)
    condition = expert.prepare(params, newest)

    def energy(target: jax.Array) -> jax.Array:
        each = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (len(target), *leaf.shape[1:])),
            condition,
        )
        value = expert.energy(params, each, target)
        if bounds is None:
            return value
        low, high = (jnp.broadcast_to(bound, target.shape) for bound in bounds)
        inside = jnp.all((target >= low) & (target <= high), axis=-1)
        return jnp.where(inside, value, jnp.inf)

    return Landscape(energy, newest.start[0], newest.scale[0])


def two_stages(
    key: jax.Array, where: Landscape, box: Box, draws: int, first_box_weight: float
) -> LogPartition:
    """``log Z`` of one row.

    The first stage only chooses the second's Gaussian, whose draws are new, so the
    estimate of ``Z`` stays unbiased.
    """
    key_first, key_second = jax.random.split(key)
    target, log_q = gaussian_mixture_proposal(
        key_first,
        where.start,
        where.scale,
        WIDE,
        draws,
        box=box,
        box_weight=first_box_weight,
    )
    weight = jax.nn.softmax(-where.energy(target) - log_q)[:, None]
    mean = jnp.sum(weight * target, axis=0)
    variance = jnp.sum(weight * jnp.square(target - mean[None]), axis=0)
    # One dominant draw would leave no width at all.
    std = jnp.maximum(jnp.sqrt(variance), 1e-2 * where.scale)
    target, log_q = gaussian_mixture_proposal(
        key_second, mean, std, NEAR, draws, box=box, box_weight=BOX_WEIGHT
    )
    return log_partition(where.energy(target), log_q)


def data_box(domain: Domain, margin: float) -> Box:
    """``margin`` times the largest magnitude of each target on the training rows."""
    change = domain.train.next_observation - domain.train.observation
    target = np.concatenate([change, domain.train.reward[:, None]], axis=1)
    high = margin * jnp.max(jnp.abs(jnp.asarray(target)), axis=0)
    return -high, high


def held_out(
    key: jax.Array,
    model: Model,
    domain: Domain,
    unit: jax.Array,
    lags: int,
    *,
    rows: int,
    draws: int,
    chain_margin: float | None,
) -> dict[str, float]:
    """Nats per held-out row, observations in units of ``unit``.

    Args:
        key: consumed.
        model: a single expert.
        domain: whose test episodes are scored.
        unit: of the observation's dimensions; the reward keeps its own.
        lags: history that the model reads.
        rows: how many, evenly spaced.
        draws: per row and stage.
        chain_margin: the energy is normalised over this many boxes of the data; None
            for one that is a density on all targets.
    """
    expert, test = model.model.expert, domain.test
    index = spaced_rows(test, rows, before=lags)
    history = gather_history(test, index, lags)
    truth = pack_target(
        jnp.asarray(test.observation[index]),
        jnp.asarray(test.next_observation[index]),
        jnp.asarray(test.reward[index]),
    )
    box = data_box(domain, chain_margin or 1.0)
    bounds = None if chain_margin is None else box

    @jax.jit
    def measure(params: Any, keys: jax.Array, history: History, truth: jax.Array):
        def one(row: Any) -> tuple[jax.Array, LogPartition]:
            row_key, past, target = row
            where = landscape(expert, params, past, bounds)
            weight = BOX_WEIGHT if bounds is None else 0.5
            estimate = two_stages(row_key, where, box, draws, weight)
            return where.energy(target[None])[0] + estimate.log_partition, estimate

        past = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), history)
        return jax.lax.map(one, (keys, past, truth))

    keys = jax.random.split(key, len(index))
    value, estimate = measure(model.params, keys, history, truth)
    value = np.asarray(value - jnp.sum(jnp.log(unit)))
    inside = np.isfinite(value)
    size = np.asarray(estimate.effective_sample_size)
    return {
        "nll": float(value[inside].mean()) if inside.any() else float("inf"),
        "nll_standard_error": float(value[inside].std() / max(inside.sum(), 1) ** 0.5),
        "rows": len(index),
        "rows_outside_the_box": int((~inside).sum()),
        "median_effective_draws": float(np.median(size)),
        "least_effective_draws": float(size.min()),
        "draws": draws,
    }
