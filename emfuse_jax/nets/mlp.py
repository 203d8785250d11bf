"""Multi-layer perceptrons as `base.Network`: flax inside, a plain pytree outside.

Initialisers are functions with the name of their source, so that a config's default can
be read: `torch_uniform` is what the published PyTorch agents start from.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from emfuse_jax.base import Network

Activation = Callable[[jax.Array], jax.Array]
Initializer = Callable[..., jax.Array]


def torch_uniform() -> Initializer:
    """U(−1/√fan_in, 1/√fan_in): the default kernel of ``torch.nn.Linear``.

    Example:
        >>> kernel = torch_uniform()(jax.random.key(0), (100, 64), jnp.float32)
        >>> 0.09 < float(jnp.abs(kernel).max()) <= 0.1
        True
    """
    return nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def he_normal() -> Initializer:
    """Normal with variance 2 / fan_in (He et al. 2015, for ReLU).

    Example:
        >>> kernel = jax.jit(lambda key: he_normal()(key, (512, 512)))(jax.random.key(0))
        >>> abs(float(kernel.var()) * 512 - 2.0) < 0.05
        True
    """
    return nn.initializers.he_normal()


def lecun_normal() -> Initializer:
    """Normal with variance 1 / fan_in (LeCun et al. 1998), the default of flax.

    Example:
        >>> kernel = jax.jit(lambda key: lecun_normal()(key, (512, 512)))(jax.random.key(0))
        >>> abs(float(kernel.var()) * 512 - 1.0) < 0.05
        True
    """
    return nn.initializers.lecun_normal()


def small_uniform(scale: float = 3e-3) -> Initializer:
    """U(−scale, scale): an output layer that starts near 0 (Lillicrap et al. 2015).

    Example:
        >>> kernel = small_uniform(3e-3)(jax.random.key(0), (256, 1))
        >>> bool(jnp.abs(kernel).max() <= 3e-3)
        True
    """

    def init(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, tuple(shape), dtype, -scale, scale)

    return init


class _Mlp(nn.Module):
    """Dense layers ``fc0 … fc{n-1}`` with an activation, then ``last_fc`` without."""

    output_size: int
    hidden_sizes: tuple[int, ...]
    activation: Activation
    kernel_init: Initializer
    output_init: Initializer

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        x = inputs[0] if len(inputs) == 1 else jnp.concatenate(inputs, axis=-1)
        for index, size in enumerate(self.hidden_sizes):
            layer = nn.Dense(size, kernel_init=self.kernel_init, name=f"fc{index}")
            x = self.activation(layer(x))
        last = nn.Dense(self.output_size, kernel_init=self.output_init, name="last_fc")
        return last(x)


def mlp(
    output_size: int,
    hidden_sizes: Sequence[int],
    *,
    activation: Activation = jax.nn.relu,
    kernel_init: Initializer | None = None,
    output_init: Initializer | None = None,
) -> Network:
    """A multi-layer perceptron over the concatenation of its inputs.

    Args:
        output_size: width of the last, linear layer.
        hidden_sizes: widths of the activated layers; empty gives a linear map.
        activation: applied after every hidden layer.
        kernel_init: of the hidden layers; None is `torch_uniform`. Biases start at 0.
        output_init: of the last layer; None is ``kernel_init``.

    Returns:
        A `Network`: ``init(key, *inputs)`` and ``apply(params, *inputs)``, where inputs
        are ``[*batch, features]`` and the output is ``[*batch, output_size]``.

    Raises:
        ValueError: if a size is not a positive integer.

    Example:
        >>> network = mlp(2, (8, 8))
        >>> params = network.init(jax.random.key(0), jnp.zeros(3), jnp.zeros(1))
        >>> network.apply(params, jnp.zeros((5, 3)), jnp.zeros((5, 1))).shape
        (5, 2)
    """
    sizes = (*hidden_sizes, output_size)
    if any(size < 1 for size in sizes):
        raise ValueError(f"layer sizes {sizes} must all be positive integers")
    kernel_init = torch_uniform() if kernel_init is None else kernel_init
    module = _Mlp(
        output_size=output_size,
        hidden_sizes=tuple(hidden_sizes),
        activation=activation,
        kernel_init=kernel_init,
        output_init=kernel_init if output_init is None else output_init,
    )
    return Network(init=module.init, apply=module.apply)
