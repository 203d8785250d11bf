"""Several experts as one transition model: ``E(y) = Σ_i λ_i(x) E_i(y)``.

A single expert is the fusion of one, so there is one code path from energies to
predictions. Experts measure their targets with scalers of their own; energies here take
raw targets, so the chain rule through each scaler is exact and only the density's constant
changes. Chains run in common coordinates ``z = (y - start) / scale``:

* ``trust`` experts (with a proposal): ``start = Σ λ_i μ_i``, ``scale = Σ λ_i σ_i``, and the
  chain stays within ``± margin · scale``. Outside its data an energy has no reason to hold
  a free chain back.
* ``box`` experts (without): ``start = 0`` (nothing changes), ``scale = max_i w_i``, the
  union of the data boxes.

Reference: EMFuse (ICLR 2026): the log-opinion pool of transition energies.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import (
    History,
    Params,
    Prediction,
    Sampler,
    TransitionModel,
    WeightFn,
)
from emfuse_jax.dynamics.base import (
    Encoded,
    Expert,
    Slices,
    make_slices,
    newest_lags,
    pack_target,
    pick_slice,
)
from emfuse_jax.dynamics.sampling import ETM_SAMPLING, SamplingConfig, chain, quiet
from emfuse_jax.dynamics.uncertainty import (
    fixed_weights,
    historical_slice_uncertainty,
    uncertainty_weights,
    uniform_weights,
)
from emfuse_jax.energy import check_weights, weighted_energy
from emfuse_jax.samplers import run_chains


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How experts are fused.

    Attributes:
        rule: uniform weights, weights from the experts' own slice uncertainties, or
            the fixed ones given.
        power: uncertainty: ``λ_i ∝ u_i^-power``.
        weights: fixed: one per expert, summing to one.
        sampling: how targets are found; none is what fits the experts.
    """

    rule: Literal["uniform", "uncertainty", "fixed"] = "uncertainty"
    power: float = 4.0
    weights: tuple[float, ...] = ()
    sampling: SamplingConfig | None = None

    def weight_rule(self) -> Float[Array, "model"] | WeightFn | None:
        """What `fuse_dynamics` takes as ``weights``."""
        if self.rule == "uncertainty":
            return uncertainty_weights(self.power)
        return jnp.asarray(self.weights) if self.rule == "fixed" else None


class _Members(NamedTuple):
    """Experts behind one interface, whether stacked (one batched GEMM) or a tuple."""

    encode: Callable[[Params, Slices], Encoded]
    prepare: Callable[[Params, Encoded], Any]
    energies: Callable[[Params, Any, jax.Array], Float[Array, "model *batch"]]
    """Of one target ``[*batch, dim]`` for all experts."""
    own_energies: Callable[[Params, Any, Any], Float[Array, "model *batch"]]
    """Of a target for each expert, ``[model, *batch, dim]``."""
    unit: Callable[[Params], Float[Array, "obs"]]
    first: Expert


class FusedSlices(NamedTuple):
    """The fused model before any chain has run, leaves ``[slice, *batch, …]``.

    ``members`` and ``weights [model, *batch]`` belong to the experts.
    """

    anchor: Float[Array, "slice *batch obs"]
    start: Float[Array, "slice *batch dim"]
    scale: Float[Array, "slice *batch dim"]
    members: Encoded
    weights: Float[Array, "model *batch"]
    valid: Bool[Array, "slice *batch"]


def fuse_dynamics(
    models: TransitionModel | Sequence[TransitionModel],
    weights: Float[Array, "model"] | WeightFn | None = None,
    *,
    sampling: SamplingConfig | None = None,
) -> TransitionModel:
    """The log-opinion pool of transition models, as one transition model.

    Args:
        models: one model, whose params are then a stack ``[model, …]`` of experts of that
            architecture, evaluated as one batched GEMM; or several models, whose params
            are the tuple of the members' params.
        weights: ``[model]`` non-negative and summing to one, or a function of the experts'
            uncertainties; None is uniform.
        sampling: how targets are found; None is `SamplingConfig()` for experts with a
            proposal and `ETM_SAMPLING` for those without.

    Raises:
        ValueError: if there is no model or one without an energy, if constant weights are
            negative, do not sum to one or are not one per model, or if the models' lags,
            anchors or regions differ.

    Example:
        >>> from emfuse_jax.base import SpaceSpec
        >>> from emfuse_jax.dynamics import AdetmConfig, adetm, uncertainty_weights
        >>> expert = adetm(AdetmConfig(), SpaceSpec(11, 3)).model
        >>> fused = fuse_dynamics([expert, expert], uncertainty_weights())
        >>> callable(fused.predict)  # (params of both, key, history): a model like any other
        True
        >>> fuse_dynamics([expert, expert], jnp.array([1.0, 1.0]))
        Traceback (most recent call last):
            ...
        ValueError: weights [1., 1.] sum to 2, expected 1; divide each by their sum: [0.5, 0.5]
    """
    stacked = isinstance(models, TransitionModel)
    experts = [
        m.expert for m in ([models] if isinstance(models, TransitionModel) else models)
    ]
    if not experts:
        raise ValueError("fuse_dynamics got no models; expected at least one")
    for index, expert in enumerate(experts):
        if expert is None:
            raise ValueError(
                f"model {index} has no energy of its own to fuse; give models of etm or "
                "adetm"
            )
    for index, expert in enumerate(experts):
        ours, first = ((e.num_lags, e.anchor, e.region) for e in (expert, experts[0]))
        if ours != first:
            raise ValueError(
                f"model {index} has (num_lags, anchor, region) = {ours}, model 0 has {first}; "
                "only models of one kind can be fused: train them with the same settings"
            )
    if weights is None:
        weight_fn: WeightFn = uniform_weights
    elif callable(weights):
        weight_fn = weights
    else:
        count = len(weights) if stacked else len(experts)
        weight_fn = fixed_weights(check_weights(weights, count))
    members = _stacked(experts[0]) if stacked else _listed(experts)
    fitting = SamplingConfig() if experts[0].region == "trust" else ETM_SAMPLING
    return _fused_model(members, weight_fn, sampling or fitting)


def transition_model(expert: Expert, sampling: SamplingConfig) -> TransitionModel:
    """The transition model of one expert: the fusion of it alone.

    Example:
        >>> expert = Expert(  # nothing is likely to change, and nothing is paid
        ...     encode=lambda params, slices: Encoded(
        ...         feature=jnp.zeros((*slices.valid.shape, 1)),
        ...         start=jnp.zeros((*slices.valid.shape, 2)),
        ...         scale=jnp.ones((*slices.valid.shape, 2)),
        ...     ),
        ...     prepare=lambda params, encoded: (),
        ...     energy=lambda params, condition, y: 0.5 * jnp.sum(y**2, axis=-1),
        ...     unit=lambda params: jnp.ones(1),
        ...     num_lags=1, anchor="backtrack", region="box", feature_size=1,
        ... )
        >>> model = transition_model(expert, SamplingConfig(num_steps=30))
        >>> history = History(jnp.zeros((1, 4, 1)), jnp.zeros((1, 4, 1)), jnp.ones((1, 4), bool))
        >>> predicted = jax.eval_shape(model.predict, (), jax.random.key(0), history)
        >>> predicted.next_observation.shape, predicted.uncertainty.shape
        ((4, 1), (4,))
    """
    members = _listed([expert])
    model = _fused_model(members, uniform_weights, sampling)
    return TransitionModel(
        predict=lambda params, key, history: model.predict((params,), key, history),
        energy=lambda params, history, next_observation, reward: model.energy(
            (params,), history, next_observation, reward
        ),
        uncertainty=lambda params, history: model.uncertainty((params,), history),
        expert=expert,
    )


def _stacked(expert: Expert) -> _Members:
    return _Members(
        encode=jax.vmap(expert.encode, in_axes=(0, None)),
        prepare=jax.vmap(expert.prepare),
        energies=jax.vmap(expert.energy, in_axes=(0, 0, None)),
        own_energies=jax.vmap(expert.energy),
        unit=lambda params: jnp.mean(jax.vmap(expert.unit)(params), axis=0),
        first=expert,
    )


def _listed(experts: Sequence[Expert]) -> _Members:
    width = max(expert.feature_size for expert in experts)

    def encode(params: Params, slices: Slices) -> Encoded:
        parts = [e.encode(p, slices) for e, p in zip(experts, params, strict=True)]
        # Encoders of different widths meet in one array; `prepare` cuts the padding off.
        padded = [
            part._replace(feature=_pad_last(part.feature, width)) for part in parts
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)

    def prepare(params: Params, encoded: Encoded) -> tuple[Any, ...]:
        rows = [Encoded(*row) for row in zip(*encoded, strict=True)]
        return tuple(
            e.prepare(p, row._replace(feature=row.feature[..., : e.feature_size]))
            for e, p, row in zip(experts, params, rows, strict=True)
        )

    def own_energies(params: Params, conditions: Any, targets: Any) -> jax.Array:
        rows = zip(experts, params, conditions, targets, strict=True)
        return jnp.stack([e.energy(p, condition, y) for e, p, condition, y in rows])

    def energies(params: Params, conditions: Any, target: jax.Array) -> jax.Array:
        return own_energies(params, conditions, [target] * len(experts))

    def unit(params: Params) -> jax.Array:
        units = [e.unit(p) for e, p in zip(experts, params, strict=True)]
        return jnp.mean(jnp.stack(units), axis=0)

    return _Members(encode, prepare, energies, own_energies, unit, experts[0])


def _pad_last(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _fused_model(
    members: _Members, weight_fn: WeightFn, sampling: SamplingConfig
) -> TransitionModel:
    expert = members.first

    def fuse(params: Params, history: History) -> FusedSlices:
        slices = make_slices(newest_lags(history, expert.num_lags), expert.anchor)
        return fuse_slices(params, slices, members, weight_fn, sampling)

    def spread(params: Params, fused: FusedSlices) -> Float[Array, "*batch"]:
        target = fused.start
        # One slice agrees with itself: its chains would run for nothing.
        if sampling.uncertainty_steps and len(target) > 1:
            silent = quiet(sampling)
            key = jax.random.key(0)  # without noise the chain draws nothing from it
            target = descend(
                key, params, fused, members, silent, sampling.uncertainty_steps
            )
        following = fused.anchor + target[..., :-1]
        return historical_slice_uncertainty(
            following, where=fused.valid, unit=members.unit(params)
        )

    def predict(params: Params, key: jax.Array, history: History) -> Prediction:
        fused = fuse(params, history)
        key_slice, key_chain = jax.random.split(key)
        index = _choose_slice(key_slice, fused.valid, sampling.slice_choice)
        one = at_slice(fused, index)
        target = descend(key_chain, params, one, members, sampling, sampling.num_steps)
        return Prediction(
            next_observation=one.anchor + target[..., :-1],
            reward=target[..., -1],
            uncertainty=spread(params, fused),
            energy=pooled_energy(params, one, members, target),
        )

    def energy(
        params: Params, history: History, next_observation: jax.Array, reward: jax.Array
    ) -> jax.Array:
        fused = fuse(params, history)
        newest = at_slice(fused, jnp.zeros(fused.valid.shape[1:], jnp.int32))
        return pooled_energy(
            params,
            newest,
            members,
            pack_target(newest.anchor, next_observation, reward),
        )

    def refuse(params: Params, slices: Slices) -> Encoded:
        del params, slices
        raise ValueError(
            "a fusion cannot be fused again; fuse all of its members at once"
        )

    return TransitionModel(
        predict,
        energy,
        lambda params, history: spread(params, fuse(params, history)),
        expert._replace(encode=refuse),
    )


def fuse_slices(
    params: Params,
    slices: Slices,
    members: _Members,
    weight_fn: WeightFn,
    sampling: SamplingConfig,
) -> FusedSlices:
    """Encodes the slices with every expert, weighs the experts, pools their starts."""
    encoded = members.encode(params, slices)
    unit = members.unit(params)

    def own_spread(target: Float[Array, "slice *batch dim"]) -> Float[Array, "*batch"]:
        following = slices.anchor + target[..., :-1]
        return historical_slice_uncertainty(following, where=slices.valid, unit=unit)

    own = encoded.start
    chains = members.first.region == "box" and sampling.num_steps > 0
    if chains and len(slices.valid) > 1:
        own = _own_modes(params, slices, encoded, members, sampling)
    weights = weight_fn(jax.vmap(own_spread)(own))
    per_row = weights[:, None, ..., None]
    if members.first.region == "trust":
        start = jnp.sum(per_row * encoded.start, axis=0)
        scale = jnp.sum(per_row * encoded.scale, axis=0)
    else:
        start, scale = jnp.mean(encoded.start, axis=0), jnp.max(encoded.scale, axis=0)
    return FusedSlices(slices.anchor, start, scale, encoded, weights, slices.valid)


def _own_modes(
    params: Params,
    slices: Slices,
    encoded: Encoded,
    members: _Members,
    sampling: SamplingConfig,
) -> Float[Array, "model slice *batch dim"]:
    """What each expert predicts alone, by its own chains: without a proposal nothing less
    tells how its slices differ. Rules that ignore uncertainties pay nothing for it, since
    the compiler drops what is not used."""
    lead = slices.valid.shape
    rows = jax.tree.map(lambda leaf: _rows_first(leaf, 1, len(lead)), encoded)

    def make_sampler(row: Encoded) -> Sampler:
        prepared = members.prepare(params, row)

        def energies(z: Float[Array, "model dim"]) -> Float[Array, "model"]:
            return members.own_energies(params, prepared, row.start + row.scale * z)

        return chain(energies, quiet(sampling), sampling.num_steps)

    z, _ = run_chains(
        jax.random.key(0),  # without noise the chain draws nothing from it
        make_sampler,
        jnp.zeros_like(rows.start),
        sampling.num_steps,
        condition=rows,
        block_rows=sampling.block_rows,
    )
    modes = jnp.moveaxis(rows.start + rows.scale * z, 1, 0)
    return modes.reshape(len(modes), *lead, -1)


def at_slice(fused: FusedSlices, index: Int[Array, "*batch"]) -> FusedSlices:
    """One slice per row; the slice axis goes from every leaf that has one."""
    members = jax.vmap(pick_slice, in_axes=(0, None))(fused.members, index)
    anchor, start, scale, valid = pick_slice(
        (fused.anchor, fused.start, fused.scale, fused.valid), index
    )
    return FusedSlices(anchor, start, scale, members, fused.weights, valid)


def pooled_energy(
    params: Params, fused: FusedSlices, members: _Members, target: jax.Array
) -> jax.Array:
    """``Σ_i λ_i E_i`` of raw targets ``[*batch, dim]``."""
    condition = members.prepare(params, fused.members)
    return weighted_energy(members.energies(params, condition, target), fused.weights)


def descend(
    key: jax.Array,
    params: Params,
    fused: FusedSlices,
    members: _Members,
    sampling: SamplingConfig,
    num_steps: int,
) -> Float[Array, "*batch dim"]:
    """Raw targets at the end of chains on the pooled energy, from ``fused.start``.

    Works on one slice per row (``[*batch]``) and on all of them (``[slice, *batch]``). The
    key is consumed; it has no effect without noise and spread.
    """
    if num_steps == 0:
        return fused.start
    lead = fused.start.shape[:-1]
    weights = jnp.broadcast_to(
        jnp.expand_dims(
            fused.weights, tuple(range(1, 1 + len(lead) - (fused.weights.ndim - 1)))
        ),
        (fused.weights.shape[0], *lead),
    )

    condition = (
        _rows_first(fused.start, 0, len(lead)),
        _rows_first(fused.scale, 0, len(lead)),
        _rows_first(weights, 1, len(lead)),
        jax.tree.map(lambda leaf: _rows_first(leaf, 1, len(lead)), fused.members),
    )

    def make_sampler(row: Any) -> Sampler:
        start, scale, row_weights, encoded = row
        prepared = members.prepare(params, encoded)

        def energy(z: Float[Array, "dim"]) -> Float[Array, ""]:
            target = start + scale * z
            return weighted_energy(
                members.energies(params, prepared, target), row_weights
            )

        return chain(energy, sampling, num_steps)

    origin = jnp.zeros_like(condition[0])
    if sampling.spread:
        key_start, key = jax.random.split(key)
        origin = sampling.spread * jax.random.normal(key_start, origin.shape)
        origin = jnp.clip(origin, -sampling.margin, sampling.margin)
    z, _ = run_chains(
        key,
        make_sampler,
        origin,
        num_steps,
        condition=condition,
        block_rows=sampling.block_rows,
    )
    return (condition[0] + condition[1] * z).reshape(*lead, -1)


def _rows_first(leaf: jax.Array, axis: int, num_axes: int) -> jax.Array:
    """Flattens ``num_axes`` axes from ``axis`` on and puts them in front."""
    flat = leaf.reshape((*leaf.shape[:axis], -1, *leaf.shape[axis + num_axes :]))
    return jnp.moveaxis(flat, axis, 0)


def _choose_slice(
    key: jax.Array, valid: Bool[Array, "slice *batch"], how: str
) -> jax.Array:
    if how == "newest":
        return jnp.zeros(valid.shape[1:], jnp.int32)
    logits = jnp.where(jnp.moveaxis(valid, 0, -1), 0.0, -jnp.inf)
    return jax.random.categorical(key, logits)
