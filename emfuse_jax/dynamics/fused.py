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
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.base import (
    History,
    Params,
    Prediction,
    TransitionModel,
    WeightFn,
)
from emfuse_jax.dynamics._fused_chains import (
    FusedSlices,
    Members,
    at_slice,
    choose_slice,
    descend,
    fuse_slices,
    pooled_energy,
)
from emfuse_jax.dynamics.base import (
    Encoded,
    Expert,
    Slices,
    make_slices,
    newest_lags,
    pack_target,
)
from emfuse_jax.dynamics.sampling import ETM_SAMPLING, SamplingConfig, quiet
from emfuse_jax.dynamics.uncertainty import (
    fixed_weights,
    historical_slice_uncertainty,
    uncertainty_weights,
    uniform_weights,
)
from emfuse_jax.energy import check_weights

__all__ = ["FusionConfig", "fuse_dynamics", "transition_model"]


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


def _stacked(expert: Expert) -> Members:
    return Members(
        encode=jax.vmap(expert.encode, in_axes=(0, None)),
        prepare=jax.vmap(expert.prepare),
        energies=jax.vmap(expert.energy, in_axes=(0, 0, None)),
        own_energies=jax.vmap(expert.energy),
        unit=lambda params: jnp.mean(jax.vmap(expert.unit)(params), axis=0),
        first=expert,
    )


def _listed(experts: Sequence[Expert]) -> Members:
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

    return Members(encode, prepare, energies, own_energies, unit, experts[0])


def _pad_last(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _fused_model(
    members: Members, weight_fn: WeightFn, sampling: SamplingConfig
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
        index = choose_slice(key_slice, fused.valid, sampling.slice_choice)
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
