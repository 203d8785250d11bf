"""Many chains at once: whole chains in blocks of rows, one stream of numbers per row.

Running all steps of a block of rows before the next block keeps the block's activations
in the cache; on CPUs that is worth more than anything inside a step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from emfuse_jax.base import Sampler, State
from emfuse_jax.loops import run_sampler

__all__ = ["run_chains"]


def run_chains(
    key: KeyArray[Array, ""] | KeyArray[Array, "rows"],
    sampler: Sampler | Callable[[Any], Sampler],
    position: Float[Array, "rows *shape"],
    num_steps: int,
    *,
    condition: Any = None,
    block_rows: int | None = 512,
    keep: Callable[[State, Any], Any] | None = None,
    thin: int = 1,
) -> tuple[Float[Array, "rows *shape"], Any]:
    """Runs one chain per row, whole chains of at most ``block_rows`` rows at a time.

    Row ``r`` draws from ``fold_in(key, r)``, and step ``i`` of it from ``fold_in`` of
    that with ``i``. So neither the size of the blocks nor the other rows change what a
    row draws: they can only move the rounding inside matrix products. Rows are split
    evenly over the blocks; where they do not divide, the last row is repeated and
    dropped again.

    Args:
        key: one key, or one per row (for rows that are split over devices).
        sampler: a `Sampler`, or ``make_sampler(condition) -> Sampler`` that is called
            with one row of ``condition``; what it computes before it returns, say an
            encoding, is computed once per chain. Either sees the position of a single
            row, ``[*shape]``, which may hold several chains, ``[chain, dim]``.
        position: where the chains start. The sampler's state has a field ``position``.
        num_steps: steps of each chain, a multiple of ``thin``.
        condition: a pytree whose leaves have the rows in front.
        block_rows: rows per block; None runs all rows as one block (accelerators).
        keep: ``(state, info) -> what to keep`` of one row, as in `run_sampler`.
        thin: keep one step of this many.

    Returns:
        The last positions, and what was kept as ``[num_steps // thin, rows, …]``.

    Raises:
        ValueError: if ``condition`` does not fit ``sampler`` or ``position``, or
            ``block_rows`` is not positive.

    Example:
        >>> from emfuse_jax.samplers import etm_langevin
        >>> def make_sampler(center):
        ...     bowl = lambda y: 10 * jnp.sum((y - center) ** 2, axis=-1)
        ...     return etm_langevin(bowl, 50, last=1e-5, noise=0.0)
        >>> centers = jnp.array([-0.5, 0.0, 0.5])
        >>> key, start = jax.random.key(0), jnp.zeros((3, 1))
        >>> end, _ = run_chains(key, make_sampler, start, 50, condition=centers)
        >>> [f"{y:.2f}" for y in end[:, 0]]
        ['-0.50', '0.00', '0.50']
    """
    rows = position.shape[0]
    _check(sampler, condition, rows, block_rows)

    def chain(row_key: jax.Array, start: jax.Array, row: Any) -> tuple[jax.Array, Any]:
        own = sampler if isinstance(sampler, Sampler) else sampler(row)
        state, kept = run_sampler(row_key, own, start, num_steps, keep=keep, thin=thin)
        return state.position, kept

    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))
    run_block = jax.vmap(chain, out_axes=(0, 1))
    if block_rows is None or rows <= block_rows:
        return run_block(key, position, condition)

    num_blocks = -(-rows // block_rows)
    block = -(-rows // num_blocks)
    source = jnp.minimum(jnp.arange(num_blocks * block), rows - 1)

    def to_blocks(leaf: jax.Array) -> jax.Array:
        padded = leaf if len(source) == rows else leaf[source]
        return padded.reshape(num_blocks, block, *leaf.shape[1:])

    blocks = jax.tree.map(to_blocks, (key, position, condition))
    end, kept = jax.lax.map(lambda arrays: run_block(*arrays), blocks)
    kept = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), kept)
    return (
        end.reshape(-1, *end.shape[2:])[:rows],
        jax.tree.map(
            lambda leaf: leaf.reshape(len(leaf), -1, *leaf.shape[3:])[:, :rows], kept
        ),
    )


def _check(sampler: Any, condition: Any, rows: int, block_rows: int | None) -> None:
    leaves = jax.tree.leaves(condition)
    if isinstance(sampler, Sampler) and leaves:
        raise ValueError(
            "run_chains got a Sampler and a condition that it cannot see; pass a "
            "function make_sampler(condition) -> Sampler instead"
        )
    if not isinstance(sampler, Sampler) and not leaves:
        raise ValueError(
            "run_chains got a function to make samplers and no condition to call it "
            "with; pass condition=…, or the Sampler itself"
        )
    for leaf in leaves:
        if jnp.shape(leaf)[:1] != (rows,):
            raise ValueError(
                f"a leaf of condition has shape {jnp.shape(leaf)}, expected {rows} "
                "rows in front, one for each position"
            )
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows={block_rows}; expected a positive number or None")
