"""Encoder of a slice of history: an anchor state and the actions taken since.

Slice ``m`` (1 ≤ m ≤ K) of a history of K lags is the state ``m - 1`` steps ago and the
last ``m`` actions. States pass an MLP; actions become tokens with learned lag positions and
pass masked multi-head attention, so that slices of every length share one set of weights.

References:
    HxLyn3 et al., "Any-step dynamics model improves future predictions for online and
    offline reinforcement learning", arXiv:2405.17031 (the slices); the attention encoder
    with valid-length masking follows the description of ADETM in EMFuse (ICLR 2026).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from emfuse_jax.base import Network


class _ActionEncoder(nn.Module):
    """Multi-head attention of the newest token over the valid ones."""

    features: int
    num_heads: int

    @nn.compact
    def __call__(
        self, action: Float[Array, "*batch lag act"], valid: Bool[Array, "*batch lag"]
    ) -> Float[Array, "*batch features"]:
        num_lags = action.shape[-2]
        position = self.param(
            "position", nn.initializers.normal(0.5), (num_lags, self.features)
        )
        position = position.reshape((1,) * (action.ndim - 2) + position.shape)
        token = nn.Dense(self.features, name="token")(action) + position
        # The newest token (lag 0) is always valid, so no row of the softmax is empty.
        newest = token[..., :1, :]
        attended = nn.MultiHeadDotProductAttention(
            self.num_heads, qkv_features=self.features, name="attention"
        )(newest, token, mask=valid[..., None, None, :])
        return nn.LayerNorm(name="norm")(newest + attended)[..., 0, :]


class _SliceEncoder(nn.Module):
    state_features: int
    action_features: int
    num_heads: int

    @nn.compact
    def __call__(
        self, anchor: jax.Array, action: jax.Array, valid: jax.Array
    ) -> jax.Array:
        # The slice's length, as the indicator of its oldest lag, joins the state: how far
        # ahead to predict matters as much as from where.
        length = valid & ~jnp.concatenate(
            [valid[..., 1:], jnp.zeros_like(valid[..., :1])], axis=-1
        )
        state = jnp.concatenate([anchor, length.astype(anchor.dtype)], axis=-1)
        for index in range(2):
            state = nn.silu(nn.Dense(self.state_features, name=f"state_{index}")(state))
        actions = _ActionEncoder(self.action_features, self.num_heads, name="action")(
            action, valid
        )
        return jnp.concatenate([state, actions], axis=-1)


def slice_encoder(
    state_features: int = 128, action_features: int = 64, num_heads: int = 4
) -> Network:
    """The encoder ``(anchor, action, valid) -> [h_s ‖ h_a]``.

    Its ``apply(params, anchor, action, valid)`` takes a normalised anchor state
    ``[*batch, obs]``, normalised actions ``[*batch, lag, act]`` (newest first) and
    ``valid [*batch, lag]``, true for the first ``m`` lags; it returns
    ``[*batch, state_features + action_features]``. Actions at invalid lags have no effect.

    Example:
        >>> encoder = slice_encoder()
        >>> inputs = jnp.zeros((7, 11)), jnp.zeros((7, 5, 3)), jnp.ones((7, 5), bool)
        >>> params = jax.eval_shape(encoder.init, jax.random.key(0), *inputs)
        >>> jax.eval_shape(encoder.apply, params, *inputs).shape
        (7, 192)
    """
    module = _SliceEncoder(state_features, action_features, num_heads)
    return Network(module.init, module.apply)
