"""Grams: the second moments of what a model's linear layers read, ``Xᵀ X``.

They are measured on each expert's own data and in its own activations. `collect_grams` is
for models given as a list of stages (a language model's layers): every batch passes one
stage before the next begins, so that the Grams of one stage are all that is held; a down
projection that reads 14336 numbers has one of 822 MB. For small models that are functions
over flax modules there is `flax_grams`.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emfuse_jax.base import Params


class Gram(NamedTuple):
    """``total = Σ x xᵀ`` over ``num_rows`` rows; leading axes where layers are stacked."""

    total: Float[Array, "*stack in in"]
    num_rows: Float[Array, "*stack"]


Grams = Mapping[str, Gram]
"""By the dotted name of the kernel that reads the inputs, such as ``layers.0.q``."""


def gram(
    inputs: Float[Array, "*batch in"], mask: Bool[Array, "*batch"] | None = None
) -> Gram:
    """``Xᵀ X`` of the rows for which ``mask`` is true, in float32 at least.

    Args:
        inputs: what a linear layer reads.
        mask: false for padding, whose rows may hold anything; None counts every row.

    Example:
        >>> gram(jnp.array([[1.0, 2.0], [9.0, 9.0]]), jnp.array([True, False]))[0].tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    wide = jnp.promote_types(inputs.dtype, jnp.float32)
    rows = inputs.astype(wide).reshape(-1, inputs.shape[-1])
    if mask is None:
        num_rows = jnp.asarray(rows.shape[0], wide)
    else:
        kept = mask.reshape(-1, 1)
        rows = jnp.where(kept, rows, 0.0)  # a product would keep a NaN of the padding
        num_rows = jnp.sum(kept, dtype=wide)
    # Accelerators would round the factors to fewer bits by default.
    return Gram(jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST), num_rows)


class Stage(NamedTuple):
    """A part of a model that runs before the next: usually one layer.

    Attributes:
        path: where its parameters lie, as keys: ``("layers", 3)``; ``()`` is the root.
        apply: ``(its params, carry) -> (carry, {name: (inputs [*batch, in], mask)})``,
            with a mask of ``[*batch]`` or None. Pass it jitted, one function for all
            layers of one kind: it is then compiled once.
        reads: the name of its inputs by kernel, such as ``{"q": "attn_in"}``; kernels that
            read the same inputs share a Gram.
    """

    path: tuple[str | int, ...]
    apply: Callable[[Params, Any], tuple[Any, Mapping[str, Any]]]
    reads: Mapping[str, str]

    def params(self, params: Params) -> Params:
        """Its part of a model's parameters."""
        return functools.reduce(operator.getitem, self.path, params)

    def kernels(self) -> dict[str, str]:
        """The name of its inputs by the kernel's name in the whole tree."""
        lead = ".".join(map(str, self.path))
        names = (f"{lead}.{kernel}" if lead else kernel for kernel in self.reads)
        return dict(zip(names, self.reads.values(), strict=True))


def collect_grams(
    stages: Sequence[Stage], params: Params, carries: Sequence[Any]
) -> Iterator[dict[str, Gram]]:
    """Runs every batch through one stage after the other, yielding each stage's Grams.

    At any time the carries (hidden states) of all batches are held, and the Grams of one
    stage. The result does not depend on how a model is cut into stages.

    Args:
        stages: in the order in which they run.
        params: the model's.
        carries: what the first stage reads, one per batch; batches of one shape are
            compiled once. The sequence itself is left alone.

    Yields:
        ``{kernel's name: Gram}`` for each stage in turn.

    Raises:
        ValueError: if there is no batch.

    Example:
        >>> stage = Stage((), lambda p, x: (x @ p["w"], {"x": (x, None)}), {"w": "x"})
        >>> (grams,) = collect_grams([stage], {"w": jnp.eye(2)}, [jnp.ones((3, 2))] * 2)
        >>> grams["w"].total.tolist(), float(grams["w"].num_rows)
        ([[6.0, 6.0], [6.0, 6.0]], 6.0)
    """
    carries = list(carries)
    if not carries:
        raise ValueError("no batches to measure Grams on; expected at least one")
    for stage in stages:
        own, totals = stage.params(params), {}
        for index, carry in enumerate(carries):
            carries[index], inputs = stage.apply(own, carry)
            for name in set(stage.reads.values()):
                totals[name] = _add(totals.get(name), gram(*inputs[name]))
        yield {kernel: totals[name] for kernel, name in stage.kernels().items()}


def _add(total: Gram | None, more: Gram) -> Gram:
    return more if total is None else jax.tree.map(jnp.add, total, more)


class GramMemory(NamedTuple):
    """Bytes that a merge by Grams holds beside the parameters.

    Attributes:
        largest: one expert's Grams of the largest stage: what is held at once.
        total: one expert's Grams of all stages: what would be held without streaming.
        carries: one expert's hidden states of all batches.
        widest: inputs of the widest layer (a number, not bytes): fewer rows than this
            make a singular Gram.
    """

    largest: int
    total: int
    carries: int
    widest: int

    @property
    def solve(self) -> int:
        """The float64 matrices in which the widest layer is solved."""
        return 3 * 8 * self.widest**2

    def peak(self, num_models: int) -> int:
        """Of `regmean_streamed` over this many experts."""
        return num_models * (self.largest + self.carries) + self.solve


def gram_memory(
    stages: Sequence[Stage], params: Params, carries: Sequence[Any]
) -> GramMemory:
    """What `collect_grams` on these arguments would hold; computes nothing.

    Example:
        >>> stage = Stage((), lambda p, x: (x @ p["w"], {"x": (x, None)}), {"w": "x"})
        >>> memory = gram_memory([stage], {"w": jnp.eye(100)}, [jnp.ones((32, 100))])
        >>> memory.largest, memory.widest  # 100² numbers and the count, of four bytes each
        (40004, 100)
    """
    carry = jax.eval_shape(lambda tree: tree, carries[0])
    held, widest, hidden = [], 0, tree_bytes(carry)
    for stage in stages:
        carry, inputs = jax.eval_shape(stage.apply, stage.params(params), carry)
        widths = [inputs[name][0].shape[-1] for name in set(stage.reads.values())]
        held.append(sum(4 * (width**2 + 1) for width in widths))
        widest = max(widest, *widths, 0)
        hidden = max(hidden, tree_bytes(carry))
    return GramMemory(max(held, default=0), sum(held), hidden * len(carries), widest)


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, arrays or their shapes.

    Example:
        >>> tree_bytes({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)})
        36
    """
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
