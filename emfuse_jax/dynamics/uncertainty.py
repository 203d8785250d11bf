"""Historical-slice uncertainty: how far one model's own slices disagree.

All slices predict the same next state from different anchors, so their spread costs no
second model. ``u² = (1/D) Σ_d Var_m ŝ_d^(m)``, with ``D u²`` the squared norm of EMFuse's
``(1/k) Σ_m ‖ŝ^(m) - s̄‖²``, and ``u`` the root that ADMPO (arXiv:2405.17031) penalises.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emfuse_jax.numerics import masked_variance, safe_sqrt


def historical_slice_uncertainty(
    predictions: Float[Array, "slice *batch dim"],
    *,
    where: Bool[Array, "slice *batch"] | None = None,
    unit: Float[Array, "dim"] | None = None,
) -> Float[Array, "*batch"]:
    """Root mean (over dimensions) population variance over the valid slices.

    Args:
        predictions: next states by slice, deterministic: independent sampling noise would
            add a floor that says nothing about the model.
        where: which slices are valid; with fewer than two the result is 0, which means
            *unknown*, not *certain*.
        unit: divides each dimension first, so that the result is in these units.

    Example:
        >>> predictions = jnp.array([[[0.0, 0.0]], [[2.0, 0.0]]])
        >>> round(float(historical_slice_uncertainty(predictions)[0]), 4)
        0.7071
    """
    if unit is not None:
        predictions = predictions / unit.reshape(
            (1,) * (predictions.ndim - 1) + unit.shape
        )
    mask = jnp.ones(predictions.shape[:-1], bool) if where is None else where
    variance = masked_variance(predictions, mask[..., None], axis=0)
    return safe_sqrt(jnp.mean(variance, axis=-1))


def uniform_weights(
    uncertainty: Float[Array, "model *batch"],
) -> Float[Array, "model *batch"]:
    """``λ_i = 1/n``: the papers' default.

    Example:
        >>> uniform_weights(jnp.array([[0.1], [0.3]])).tolist()  # whatever they know
        [[0.5], [0.5]]
    """
    return jnp.full_like(uncertainty, 1.0 / uncertainty.shape[0])


def fixed_weights(weights: Float[Array, "model"]):
    """A `WeightFn` of constants; that they sum to one is checked where experts are fused.

    Example:
        >>> fixed_weights(jnp.array([0.75, 0.25]))(jnp.array([[0.1], [0.3]])).tolist()
        [[0.75], [0.25]]
    """

    def weight_fn(uncertainty: jax.Array) -> jax.Array:
        if weights.shape[0] != uncertainty.shape[0]:
            raise ValueError(
                f"{weights.shape[0]} weights for {uncertainty.shape[0]} experts; give "
                "one weight per expert"
            )
        shape = (weights.shape[0],) + (1,) * (uncertainty.ndim - 1)
        return jnp.broadcast_to(weights.reshape(shape), uncertainty.shape)

    return weight_fn


def uncertainty_weights(power: float = 4.0, floor: float = 1e-4):
    """``λ_i ∝ u_i^-power`` from each expert's own slice uncertainty.

    An expert outside its data disagrees with itself and loses its vote; a large power makes
    a gate. Where no expert knows its uncertainty (all zero) the weights are uniform.

    Args:
        power: 0 is uniform; 4 was the best of 1, 2, 4, 8 on Hopper.
        floor: added to ``u``, in its units.

    Example:
        >>> u = jnp.array([[0.1, 0.0], [0.3, 0.0]])  # [model, row]; the second row: unknown
        >>> weights = uncertainty_weights()(u)
        >>> [f"{x:.3f}" for x in weights[:, 0]], weights[:, 1].tolist()
        (['0.988', '0.012'], [0.5, 0.5])
    """

    def weight_fn(
        uncertainty: Float[Array, "model *batch"],
    ) -> Float[Array, "model *batch"]:
        return jax.nn.softmax(-power * jnp.log(uncertainty + floor), axis=0)

    return weight_fn
