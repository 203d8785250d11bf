"""Slices of several experts, their pooled energy, and the chains that descend it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from emfuse_jax.base import (
    Params,
    Sampler,
    WeightFn,
)
from emfuse_jax.dynamics.base import (
    Encoded,
    Expert,
    Slices,
    pick_slice,
)
from emfuse_jax.dynamics.sampling import SamplingConfig, chain, quiet
from emfuse_jax.dynamics.uncertainty import (
    historical_slice_uncertainty,
)
from emfuse_jax.energy import weighted_energy
from emfuse_jax.samplers import run_chains


class Members(NamedTuple):
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


def fuse_slices(
    params: Params,
    slices: Slices,
    members: Members,
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
    members: Members,
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
    params: Params, fused: FusedSlices, members: Members, target: jax.Array
) -> jax.Array:
    """``Σ_i λ_i E_i`` of raw targets ``[*batch, dim]``."""
    condition = members.prepare(params, fused.members)
    return weighted_energy(members.energies(params, condition, target), fused.weights)


def descend(
    key: jax.Array,
    params: Params,
    fused: FusedSlices,
    members: Members,
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


def choose_slice(
    key: jax.Array, valid: Bool[Array, "slice *batch"], how: str
) -> jax.Array:
    if how == "newest":
        return jnp.zeros(valid.shape[1:], jnp.int32)
    logits = jnp.where(jnp.moveaxis(valid, 0, -1), 0.0, -jnp.inf)
    return jax.random.categorical(key, logits)
