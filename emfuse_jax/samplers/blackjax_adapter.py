"""blackjax's kernels on our energies, and its diagnostics on our array layout.

Kernels with an accept step (MALA, HMC, NUTS) are exact where `ula` is biased; write
``from_blackjax(blackjax.mala, energy_fn, step_size=0.1)``.

References:
    Cabezas et al., "BlackJAX: Composable Bayesian Inference in JAX", 2024.
    https://arxiv.org/abs/2402.10797
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from emfuse_jax.base import EnergyFn, Key, Sampler, State

__all__ = ["effective_sample_size", "from_blackjax", "potential_scale_reduction"]


def from_blackjax(
    build: Callable[..., Any], energy_fn: EnergyFn, **options: Any
) -> Sampler:
    """A blackjax algorithm as a `Sampler` of ``exp(-E)``, one chain per row.

    Args:
        build: a top-level blackjax algorithm whose state has a ``position``:
            ``blackjax.mala``, ``blackjax.hmc``, ``blackjax.nuts``, ….
        energy_fn: ``[*batch, dim] -> [*batch]``.
        **options: its parameters, for instance ``step_size=0.1``.

    Returns:
        A `Sampler` whose state and info are the algorithm's own, batch in front. Row
        ``r`` uses key ``r`` of ``split(key, rows)``.

    Raises:
        ValueError: while tracing, if the algorithm's state has no ``position``.

    Example:
        >>> import blackjax
        >>> def energy_fn(y):
        ...     return 0.5 * jnp.sum(y**2, axis=-1)
        >>> sampler = from_blackjax(blackjax.mala, energy_fn, step_size=0.1)
        >>> state = sampler.init(jnp.zeros((4, 2)))
        >>> state, info = sampler.step(jax.random.key(0), state)
        >>> info.acceptance_rate.shape
        (4,)
    """
    algorithm = build(lambda position: -energy_fn(position), **options)

    def init(position: Float[Array, "*batch dim"]) -> State:
        state = _vmap_times(algorithm.init, position.ndim - 1)(position)
        if not hasattr(state, "position"):
            raise ValueError(
                f"the state of {build} is a {type(state).__name__} without a position; "
                "expected a Markov chain algorithm such as blackjax.mala"
            )
        return state

    def step(key: Key, state: State) -> tuple[State, Any]:
        batch = state.position.shape[:-1]
        keys = jax.random.split(key, batch) if batch else key
        return _vmap_times(algorithm.step, len(batch))(keys, state)

    return Sampler(init, step)


def effective_sample_size(
    samples: Float[Array, "time chain *event"],
) -> Float[Array, "*event"]:
    """How many independent draws the chains are worth, by blackjax's estimator.

    Args:
        samples: time first, as `run_sampler` keeps them.

    Example:
        >>> import jax
        >>> draws = jax.random.normal(jax.random.key(0), (200, 4, 1))  # [time, chain, dim]
        >>> with jax.numpy_rank_promotion("allow"):  # blackjax's own arithmetic
        ...     size = jax.jit(effective_sample_size)(draws)
        >>> bool((size > 500).all()), size.shape  # independent draws: about one each
        (True, (1,))
    """
    from blackjax import diagnostics

    size = diagnostics.effective_sample_size(samples, chain_axis=1, sample_axis=0)
    return jnp.reshape(size, samples.shape[2:])  # blackjax drops axes of size 1


def potential_scale_reduction(
    samples: Float[Array, "time chain *event"],
) -> Float[Array, "*event"]:
    """Gelman and Rubin's R-hat, near 1 where the chains agree, by blackjax.

    Args:
        samples: time first, as `run_sampler` keeps them; at least two chains.

    Raises:
        ValueError: for a single chain.

    Example:
        >>> import jax
        >>> draws = jax.random.normal(jax.random.key(0), (200, 4, 1))  # [time, chain, dim]
        >>> apart = draws + 10 * jnp.arange(4.0)[None, :, None]  # chains that never met
        >>> with jax.numpy_rank_promotion("allow"):  # blackjax's own arithmetic
        ...     r_hat = jax.jit(potential_scale_reduction)
        ...     bool((r_hat(draws) < 1.05).all()), bool((r_hat(apart) > 5).all())
        (True, True)
    """
    from blackjax import diagnostics

    if samples.shape[1] < 2:
        raise ValueError("R-hat compares chains and got one; run at least two")
    rhat = diagnostics.potential_scale_reduction(samples, chain_axis=1, sample_axis=0)
    return jnp.reshape(rhat, samples.shape[2:])  # as above


def _vmap_times(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    for _ in range(times):
        function = jax.vmap(function)
    return function
