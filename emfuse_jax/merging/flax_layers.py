"""Grams of flax's dense layers, wherever a function runs them.

A layer's Gram is written as the derivative with respect to a companion of its kernel, a
parameter that adds nothing: so jax itself carries it out of ``vmap``, ``scan`` and
``checkpoint`` and sums it over what was mapped, which a list that layers append their
inputs to could not do.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from emfuse_jax.base import Params
from emfuse_jax.merging.grams import Gram, gram
from emfuse_jax.merging.soup import leaf_name


def flax_grams(fn: Callable[..., Any], params: Params, *args: Any) -> dict[str, Gram]:
    """Grams of the dense layers that ``fn(params, *args)`` runs; jit it.

    Layers are ``Dense`` and ``DenseGeneral`` (attention's projections) applied from the
    ``{"params": …}`` trees among ``params``, in whatever the function maps, scans or
    rematerialises; of layers that are stacked and mapped over, each gets its own Gram.
    Grams of several batches add up leaf by leaf.

    Every row counts, so pass only rows without padding. A layer counts where a floating
    output of ``fn`` depends on it by differentiation: not behind ``stop_gradient``.

    Args:
        fn: runs the model on a batch, such as a transition model's energy.
        params: its first argument.
        *args: the rest.

    Returns:
        ``{kernel's name: Gram}`` of every layer that ran.

    Example:
        >>> layer = nn.Dense(3)
        >>> params = layer.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> grams = flax_grams(layer.apply, params, jnp.ones((5, 2)))
        >>> grams["params.kernel"].total.tolist()
        [[5.0, 5.0], [5.0, 5.0]]
    """
    empty = _empty_grams(fn, params, *args)

    def outputs(grams: dict[str, Gram]) -> jax.Array:
        with nn.intercept_methods(_tap_dense):
            result = fn(_with_collection(params, grams), *args)
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(result)]
        floating = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        return functools.reduce(operator.add, map(jnp.sum, floating))

    return jax.grad(outputs)(empty)


_COLLECTION = "grams"


def _empty_grams(fn: Callable[..., Any], params: Params, *args: Any) -> dict[str, Gram]:
    """Zeros of the right shapes for every dense layer that runs, found by an abstract
    run in which each kernel has a companion of its shape and a last axis of its own size:
    transformations take leading axes away, so the last one still tells which it is."""
    kernels = _kernels(params)
    names = list(kernels)
    tags = {
        name: jax.ShapeDtypeStruct((*kernels[name].shape, 1 + index), jnp.float32)
        for index, name in enumerate(names)
    }
    found: dict[str, tuple[tuple[int, ...], int]] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        tag = _companion(context)
        if tag is not None:
            name = names[tag.shape[-1] - 1]
            shape = kernels[name].shape
            width = _rows(context.module, _inputs(args, kwargs)).shape[-1]
            found[name] = shape[: len(shape) - (tag.ndim - 1)], width
        return next_fun(*args, **kwargs)

    def run(params: Params, tags: Any, *args: Any) -> Any:
        with nn.intercept_methods(record):
            return fn(_with_collection(params, tags), *args)

    jax.eval_shape(run, params, tags, *args)

    def zeros(name: str) -> Gram:
        stack, width = found[name]
        wide = jnp.promote_types(kernels[name].dtype, jnp.float32)
        return Gram(jnp.zeros((*stack, width, width), wide), jnp.zeros(stack, wide))

    return {name: zeros(name) for name in names if name in found}


def _tap_dense(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    companion = _companion(context)
    if companion is None:
        return next_fun(*args, **kwargs)
    inputs = _inputs(args, kwargs)
    rows = _rows(context.module, inputs)
    axes = _axes(context.module, inputs.ndim)
    lead = [size for axis, size in enumerate(inputs.shape) if axis not in axes]
    kept = [inputs.shape[axis] for axis in axes]
    tapped = _tap(rows, companion).reshape(*lead, *kept)
    tail = range(inputs.ndim - len(axes), inputs.ndim)
    return next_fun(jnp.moveaxis(tapped, tuple(tail), axes))


@jax.custom_vjp
def _tap(rows: jax.Array, companion: Gram) -> jax.Array:
    """The rows themselves; the companion's derivative is their Gram, by definition."""
    del companion
    return rows


def _tap_forward(rows: jax.Array, companion: Gram) -> tuple[jax.Array, Any]:
    return rows, (rows, companion)


def _tap_backward(saved: Any, cotangent: jax.Array) -> tuple[jax.Array, Gram]:
    rows, companion = saved
    # Under vmap a derivative is summed over the mapped axis only if it depends on what is
    # mapped, so the count is written as if it depended on the rows.
    ones = jnp.where(rows[..., 0] > 0, 1.0, 1.0)
    own = gram(rows)._replace(num_rows=jnp.sum(ones))
    return cotangent, jax.tree.map(lambda x, y: x.astype(y.dtype), own, companion)


_tap.defvjp(_tap_forward, _tap_backward)


def _companion(context: Any) -> Any:
    """What lies beside the kernel of the dense layer that is being called, or None."""
    module = context.module
    dense = type(module) in (nn.Dense, nn.DenseGeneral)
    if not dense or context.method_name != "__call__":
        return None
    if getattr(module, "batch_dims", ()) or not module.has_variable(
        _COLLECTION, "kernel"
    ):
        return None
    return module.get_variable(_COLLECTION, "kernel")


def _inputs(args: Any, kwargs: Any) -> jax.Array:
    return jnp.asarray(args[0] if args else kwargs["inputs"])


def _axes(module: nn.Module, ndim: int) -> tuple[int, ...]:
    """The axes of its inputs that a dense layer contracts."""
    axes = getattr(module, "axis", -1)
    return tuple(a % ndim for a in ((axes,) if isinstance(axes, int) else axes))


def _rows(module: nn.Module, inputs: jax.Array) -> jax.Array:
    """The layer's inputs as ``[*batch, in]``, the contracted axes in the kernel's order."""
    axes = _axes(module, inputs.ndim)
    tail = tuple(range(inputs.ndim - len(axes), inputs.ndim))
    moved = jnp.moveaxis(inputs, axes, tail)
    return moved.reshape(*moved.shape[: tail[0]], -1)


def _is_variables(tree: Any) -> bool:
    return isinstance(tree, Mapping) and "params" in tree


def _kernels(params: Params) -> dict[str, Any]:
    """Leaves called ``kernel`` of the flax trees among ``params``, by full name."""
    found = {}
    for path, tree in _variables(params):
        if _is_variables(tree):
            leaves = jax.tree_util.tree_flatten_with_path(tree["params"])[0]
            for inner, leaf in leaves:
                if getattr(inner[-1], "key", None) == "kernel":
                    found[_full_name(path, inner)] = leaf
    return found


def _with_collection(params: Params, values: Mapping[str, Any]) -> Params:
    """``params`` with each kernel's companion in a collection beside it."""

    def extend(path: Any, tree: Any) -> Any:
        if not _is_variables(tree):
            return tree
        collection: dict[str, Any] = {}
        for inner, _ in jax.tree_util.tree_flatten_with_path(tree["params"])[0]:
            if _full_name(path, inner) in values:
                place = collection
                for key in inner[:-1]:
                    place = place.setdefault(key.key, {})
                place[inner[-1].key] = values[_full_name(path, inner)]
        return {**tree, _COLLECTION: collection}

    structure = jax.tree.structure(params, is_leaf=_is_variables)
    extended = [extend(path, tree) for path, tree in _variables(params)]
    return jax.tree.unflatten(structure, extended)


def _variables(params: Params) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_variables)[0]


def _full_name(path: Any, inner: Any) -> str:
    return leaf_name((*path, jax.tree_util.DictKey("params"), *inner))
