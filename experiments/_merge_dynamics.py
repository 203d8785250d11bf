"""Dynamics models as experts of a merge: their data, their layers, their errors."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emfuse_jax import artifacts
from emfuse_jax.artifacts import Trained
from emfuse_jax.artifacts.descriptions import is_uniform
from emfuse_jax.base import History, Params, TransitionModel
from emfuse_jax.data import Dataset, concatenate, gather_history
from emfuse_jax.dynamics import Expert, make_slices, pack_target
from emfuse_jax.merging import (
    GramMemory,
    check_same_architecture,
    flax_grams,
    regmean,
    tree_bytes,
)
from experiments._measure import (
    Domain,
    Measured,
    check_held_out,
    check_sizes,
    data_behind,
    load_domains,
    pooled_unit,
    spaced_rows,
)
from experiments._merging import GramPlan, Mergeable
from experiments._run import Run

_BATCH = 1024
"""Rows of data per pass."""


def open_dynamics(
    paths: Sequence[str],
    data: Sequence[str],
    *,
    with_grams: bool,
    num_samples: int,
) -> Mergeable:
    """Run directories of dynamics models.

    Args:
        paths: of one architecture.
        data: one data set per expert; none is what each was trained on.
        with_grams: whether RegMean is to be planned.
        num_samples: training rows per expert that Grams are measured on, at most.

    Raises:
        FileNotFoundError: if a run or its data are not there.
        ValueError: if a run is of no single dynamics model, the architectures differ (the
            leaf is named), or the data do not fit.
    """
    experts = {path: artifacts.load_run(path) for path in paths}
    _check(experts)
    first = experts[paths[0]]
    if len(data) not in (0, len(paths)):
        raise ValueError(
            f"--data names {len(data)} data sets for {len(paths)} experts; give one for "
            "each, in their order, or none for those that they were trained on"
        )
    sources = [(s,) for s in data] or [data_behind([path]) for path in paths]
    names = tuple(dict.fromkeys(source for own in sources for source in own))
    domains = dict(zip(names, load_domains(names, min_length=1), strict=True))
    check_sizes(list(domains.values()), first.spec, paths[0])
    lags = first.description["config"].get("num_lags", 1)
    check_held_out(list(domains.values()), lags)
    unit = pooled_unit(list(domains.values()))
    params = [expert.params for expert in experts.values()]

    def errors(params: Params, part: Callable[[Domain], Dataset]) -> list[float]:
        measured = Measured(first.model, params, unit, lags=lags)
        return [measured.one_step(part(domain)).rms for domain in domains.values()]

    plan = None
    if with_grams:
        rows = [concatenate([domains[s].train for s in own]) for own in sources]
        plan = _plan(first.model, params, rows, lags, num_samples)
    return Mergeable(
        names=tuple(paths),
        params=params,
        family="dynamics",
        unit="one-step error (pooled std of Δs)",
        domains=names,
        measure=lambda params: errors(params, lambda domain: domain.test),
        validate=lambda params: errors(params, lambda domain: domain.validation),
        plan=plan,
        save=lambda run, params: _save(run, params, first.description),
    )


def _check(experts: dict[str, Trained]) -> None:
    for path, expert in experts.items():
        kind = expert.description["kind"]
        if kind == "fused" or expert.model is None:
            raise ValueError(
                f"{path} holds a {kind!r}; give runs of single dynamics models"
                + (", such as the fusion's members" if kind == "fused" else "")
            )
        if expert.description["num_seeds"] > 1:
            raise ValueError(f"{path} holds several seeds; give runs of one")
    paths, trained = list(experts), list(experts.values())
    check_same_architecture([expert.params for expert in trained], paths)
    for path, expert in experts.items():
        pair = [trained[0].description, expert.description]
        if not is_uniform(pair):
            changed = artifacts.differences(pair[0], pair[1])
            raise ValueError(
                f"{path} is not of the architecture of {paths[0]} "
                f"({'; '.join(changed[:5])}); only models of one can be merged"
            )


def _save(run: Run, params: Params, description: dict[str, Any]) -> None:
    """As a model that `artifacts.load_run` rebuilds."""
    merged = {**description, "params_in": "checkpoints"}
    artifacts.write_description(run.path, merged)
    artifacts.delete_after(run.checkpoints, -1)  # what a kill may have left
    run.save(0, params)


def _plan(
    model: TransitionModel,
    params: list[Params],
    rows: list[Dataset],
    lags: int,
    num_samples: int,
) -> GramPlan:
    run = _layers_of_expert(model.expert) if model.expert else _layers_of_model(model)
    batches = [_Batches(dataset, lags, num_samples) for dataset in rows]

    @jax.jit
    def step(params: Params, total: Any, *batch: Any) -> Any:
        return jax.tree.map(jnp.add, total, flax_grams(run, params, *batch))

    shapes = jax.eval_shape(
        lambda *args: flax_grams(run, *args), params[0], *batches[0].get(0)
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    widest = max(shapes, key=lambda name: shapes[name].total.shape[-1])
    held, width = tree_bytes(shapes), shapes[widest].total.shape[-1]
    counts = []
    for tree, own in zip(params, batches, strict=True):
        seen = step(tree, zeros, *own.get(0))[widest].num_rows
        counts.append(int(np.min(np.asarray(seen))) * len(own))

    def merge(on_step: Callable[[int], Any], **options: Any) -> Params:
        grams, done = [], 0
        for tree, own in zip(params, batches, strict=True):
            total = zeros
            for index in range(len(own)):
                total = step(tree, total, *own.get(index))
                on_step(done := done + 1)
            grams.append(total)
        return regmean(params, grams, **options)

    memory = GramMemory(largest=held, total=held, carries=0, widest=width)
    return GramPlan(memory, tuple(counts), sum(map(len, batches)), merge)


class _Batches:
    """Training rows with a whole history behind them, so that nothing is padding."""

    def __init__(self, dataset: Dataset, lags: int, num_samples: int) -> None:
        count = len(spaced_rows(dataset, num_samples, before=lags - 1))
        self._size = min(_BATCH, count)
        count -= count % self._size  # one shape, compiled once
        self._rows = spaced_rows(dataset, count, before=lags - 1)
        self._dataset, self._lags = dataset, lags

    def __len__(self) -> int:
        return len(self._rows) // self._size

    def get(self, index: int) -> tuple[jax.Array, History, jax.Array, jax.Array]:
        """Key, histories, rewards and next observations of one batch."""
        rows = self._rows[index * self._size : (index + 1) * self._size]
        return (
            jax.random.fold_in(jax.random.key(0), index),
            gather_history(self._dataset, rows, self._lags),
            jnp.asarray(self._dataset.reward[rows]),
            jnp.asarray(self._dataset.next_observation[rows]),
        )


def _layers_of_expert(expert: Expert) -> Callable[..., Any]:
    """Runs every layer of an energy model: on each slice of the history, at the target
    that followed and at one drawn where chains go."""

    def run(
        params: Params,
        key: jax.Array,
        history: History,
        reward: jax.Array,
        next_observation: jax.Array,
    ) -> tuple[jax.Array, ...]:
        slices = make_slices(history, expert.anchor)
        lead = slices.anchor.shape[:-1]
        target = pack_target(
            slices.anchor,
            jnp.broadcast_to(next_observation[None], slices.anchor.shape),
            jnp.broadcast_to(reward[None], lead),
        )
        encoded = expert.encode(params, slices)
        condition = expert.prepare(params, encoded)
        if expert.region == "trust":
            noise = jax.random.normal(key, encoded.start.shape)
        else:
            noise = jax.random.uniform(key, encoded.start.shape, minval=-1.0)
        near = encoded.start + encoded.scale * noise
        return (
            expert.energy(params, condition, target),
            expert.energy(params, condition, near),
            encoded.start,
        )

    return run


def _layers_of_model(model: TransitionModel) -> Callable[..., Any]:
    def run(
        params: Params,
        key: jax.Array,
        history: History,
        reward: jax.Array,
        next_observation: jax.Array,
    ) -> jax.Array:
        del key
        return model.energy(params, history, next_observation, reward)

    return run
