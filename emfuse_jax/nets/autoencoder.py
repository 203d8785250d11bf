"""An autoencoder whose code lies in a box of known size.

``tanh`` bounds the code to ``[-1, 1]``, and noise on the code while training makes it use
that box: then the width of a perturbation, or the step of a chain, means the same for
every data set, without statistics of a batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.base import Params
from emfuse_jax.nets.mlp import Activation, mlp


class Autoencoder(NamedTuple):
    """``init(key, target) -> params``; ``encode(params, target [*batch, dim]) -> code
    [*batch, latent]`` in ``[-1, 1]``; ``decode(params, code) -> target``."""

    init: Callable[[jax.Array, jax.Array], Params]
    encode: Callable[[Params, jax.Array], jax.Array]
    decode: Callable[[Params, jax.Array], jax.Array]


def autoencoder(
    target_size: int,
    latent_size: int,
    hidden_sizes: Sequence[int] = (128, 128),
    *,
    activation: Activation = jax.nn.silu,
) -> Autoencoder:
    """Two MLPs of mirrored widths.

    Args:
        target_size: dimension of what is encoded.
        latent_size: dimension of the code.
        hidden_sizes: of the encoder; the decoder has them in reverse.
        activation: of the hidden layers; smooth, since chains run through the decoder.

    Raises:
        ValueError: if the code is empty, or as large as the target: nothing would keep
            it to a manifold.

    Example:
        >>> coder = autoencoder(4, 2, (8,))
        >>> params = coder.init(jax.random.key(0), jnp.zeros((3, 4)))
        >>> coder.decode(params, coder.encode(params, jnp.zeros((3, 4)))).shape
        (3, 4)
    """
    if not 0 < latent_size < target_size:
        raise ValueError(
            f"latent_size={latent_size} must be at least 1 and below the target's size "
            f"{target_size}, or the code is no manifold of lower dimension"
        )
    encoder = mlp(latent_size, tuple(hidden_sizes), activation=activation)
    decoder = mlp(target_size, tuple(hidden_sizes)[::-1], activation=activation)

    def init(key: jax.Array, target: Float[Array, "*batch dim"]) -> Params:
        key_encoder, key_decoder = jax.random.split(key)
        code = jnp.zeros((*target.shape[:-1], latent_size))
        return {
            "encoder": encoder.init(key_encoder, target),
            "decoder": decoder.init(key_decoder, code),
        }

    def encode(params: Params, target: jax.Array) -> jax.Array:
        return jnp.tanh(encoder.apply(params["encoder"], target))

    def decode(params: Params, code: jax.Array) -> jax.Array:
        return decoder.apply(params["decoder"], code)

    return Autoencoder(init, encode, decode)
