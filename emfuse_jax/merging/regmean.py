"""RegMean: each linear layer of the merged model fits those of the experts, on their data.

For a layer with kernels ``W_i`` (inputs times outputs) and Grams ``G_i`` (means over rows),

    W = argmin Σ_i w_i tr[(W - W_i)ᵀ G̃_i (W - W_i)] + r ‖W - W̄‖²,   W̄ = Σ_i w_i W_i,

that is ``W = W̄ + (Σ_i w_i G̃_i + r I)⁻¹ Σ_i w_i G̃_i (W_i - W̄)``, with shrinkage
``G̃ = (1 - s) G + s diag(G)`` and ridge ``r``. Everything else (biases, norms, embeddings)
is the mean. Each model counts by its weight ``w_i`` however much data it was measured on;
with weights in proportion to the rows, layers that are least-squares fits merge to the fit
of all data together.

Unlike the pool of energies this needs data of each expert's own domain.

Differences from the published code: the shrinkage there is the factor ``α = 1 - s``; the
ridge pulls towards the mean and not towards zero, so that inputs on which nothing was
measured keep the soup's weights; and layers are solved in float64 from the mean on, since
a Gram has the square of its data's condition number.

Reference:
    Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR
    2023, arXiv:2212.09849 (eq. 2 and section 4.2).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emfuse_jax.base import Params
from emfuse_jax.merging.grams import Gram, Grams, Stage, collect_grams
from emfuse_jax.merging.soup import (
    check_same_architecture,
    convex_weights,
    model_soup,
    named_leaves,
    replace_leaves,
)

_AnyArray = Array | np.ndarray


def merge_linear(
    kernels: Sequence[Any] | Float[_AnyArray, "model in out"],
    grams: Sequence[Any] | Float[_AnyArray, "model in in"],
    *,
    weights: Any = None,
    shrinkage: float = 0.1,
    ridge: float = 0.0,
) -> Float[np.ndarray, "in out"]:
    """Merges one linear layer, in float64 on the host whatever the arrays' dtype.

    Args:
        kernels: one ``[in, out]`` per model.
        grams: one ``[in, in]`` per model, all in one unit: means over rows, or sums where
            models are to count by their rows.
        weights: ``[model]``, non-negative and summing to one; None is uniform.
        shrinkage: how much of the Grams' off-diagonals is left out, in [0, 1]; 1 weighs
            every input by itself.
        ridge: the pull towards the weighted mean, in units of the mean diagonal of the
            weighted Grams.

    Returns:
        The merged kernel, in the dtype of the first.

    Raises:
        ValueError: if the Grams are singular up to rounding, or an option is out of range.

    Example:
        >>> kernels = np.array([[[1.0], [1.0]], [[3.0], [3.0]]])
        >>> grams = np.array([np.diag([1.0, 0.0]), np.diag([0.0, 1.0])])
        >>> merge_linear(kernels, grams).round(6).tolist()  # each knows one input
        [[1.0], [3.0]]
    """
    check_options(shrinkage, ridge)
    shares = convex_weights(weights, len(kernels))
    wide = [np.asarray(kernel, np.float64) for kernel in kernels]
    mean = np.sum([w * kernel for w, kernel in zip(shares, wide, strict=True)], axis=0)
    total = np.zeros((len(mean),) * 2)
    pull = np.zeros_like(mean)
    for share, kernel, gram in zip(shares, wide, grams, strict=True):
        matrix = np.array(gram, np.float64)
        diagonal = np.diag(matrix).copy()
        matrix *= (1.0 - shrinkage) * share
        np.fill_diagonal(matrix, diagonal * share)
        pull += matrix @ (kernel - mean)
        total += matrix
    scale = float(np.mean(np.diag(total)))
    if ridge:
        # Of a layer whose inputs were all zero nothing is known: any unit will do.
        total[np.diag_indices_from(total)] += ridge * (scale or 1.0)
    tolerance = float(jnp.finfo(jnp.result_type(grams[0])).eps)
    merged = mean + _solve(total, pull, tolerance)
    return merged.astype(kernels[0].dtype)


def check_options(shrinkage: float, ridge: float) -> None:
    """Refuses a shrinkage or a ridge out of range with a `ValueError`.

    Example:
        >>> check_options(shrinkage=0.1, ridge=0.0)
        >>> check_options(shrinkage=1.1, ridge=0.0)
        Traceback (most recent call last):
            ...
        ValueError: shrinkage=1.1; expected a value in [0, 1], 0 for the Grams as they are ...
    """
    if not 0.0 <= shrinkage <= 1.0:
        raise ValueError(
            f"shrinkage={shrinkage}; expected a value in [0, 1], 0 for the Grams as they "
            "are (the published α is 1 - shrinkage)"
        )
    if not (ridge >= 0.0 and np.isfinite(ridge)):
        raise ValueError(f"ridge={ridge}; expected 0 or a small number such as 1e-4")


def _solve(matrix: np.ndarray, right: np.ndarray, tolerance: float) -> np.ndarray:
    """``matrix⁻¹ right`` by Cholesky; the matrix is overwritten.

    Raises:
        ValueError: if it is singular to within ``tolerance``.
    """
    from scipy import linalg

    diagonal = np.diag(matrix)
    if not np.isfinite(matrix).all():
        raise ValueError(
            "the Grams hold NaN or infinity; look at the data and the model"
        )
    silent = int(np.sum(diagonal <= 0.0))
    if silent:
        raise ValueError(
            f"{silent} of {len(diagonal)} inputs were always 0, so the Grams are singular; "
            "give a ridge such as 1e-4, which keeps the mean's weights there"
        )
    # Units of one: inputs of very different size make no layer ill-conditioned.
    unit = 1.0 / np.sqrt(diagonal)
    matrix *= unit[:, None]
    matrix *= unit[None]
    norm = float(np.max(np.sum(np.abs(matrix), axis=0)))
    factor, smallest = matrix, 0.0
    try:
        factor = linalg.cholesky(matrix, overwrite_a=True, check_finite=False)
        (pocon,) = linalg.get_lapack_funcs(("pocon",), (factor,))
        # At most the smallest eigenvalue: below the Grams' rounding it is noise.
        smallest = float(pocon(factor, norm)[0]) * norm
    except linalg.LinAlgError:
        pass
    if smallest < tolerance:
        raise ValueError(
            f"the Grams of {len(unit)} inputs are singular (with inputs in units of their "
            f"size, the smallest eigenvalue is about {smallest:.1g}); measure on more data, "
            "or give a larger ridge, such as 1e-4"
        )
    solved = linalg.cho_solve((factor, False), unit[:, None] * right)
    return unit[:, None] * solved


def regmean(
    params: Sequence[Params],
    grams: Sequence[Grams],
    *,
    weights: Any = None,
    shrinkage: float = 0.1,
    ridge: float = 0.0,
) -> Params:
    """Merges models: layers with a Gram by `merge_linear`, all other leaves by the mean.

    Args:
        params: one tree per model, of one structure and the same shapes.
        grams: per model, its Grams by the kernels' dotted names; the same names for
            every model. Kernels may be ``[*stack, *in, *out]``: axes that the Gram does
            not have in front, then input axes whose product is the Gram's size.
        weights: ``[model]``, non-negative and summing to one; None is uniform. In
            proportion to the rows, it is the fit of all data together.
        shrinkage: see `merge_linear`.
        ridge: see `merge_linear`; positive, it also allows Grams of fewer rows than
            inputs.

    Raises:
        ValueError: if the architectures differ (the leaf is named), a Gram has no kernel
            or not its size, was measured on fewer rows than it has inputs and there is no
            ridge, or is singular.

    Example:
        >>> from emfuse_jax.merging.grams import gram
        >>> trees = [{"w": jnp.array([[1.0]])}, {"w": jnp.array([[4.0]])}]
        >>> grams = [{"w": gram(jnp.ones((5, 1)))}, {"w": gram(jnp.full((5, 1), 0.5))}]
        >>> round(float(regmean(trees, grams)["w"][0, 0]), 3)  # (1 · 1 + 0.25 · 4) / 1.25
        1.6
    """
    options = {"weights": weights, "shrinkage": shrinkage, "ridge": ridge}
    merged = merge_layers(params, grams, **options)
    return replace_leaves(model_soup(params, weights), merged)


def regmean_streamed(
    params: Sequence[Params],
    stages: Sequence[Stage],
    carries: Sequence[Sequence[Any]],
    *,
    weights: Any = None,
    shrinkage: float = 0.1,
    ridge: float = 0.0,
    on_stage: Callable[[int], Any] | None = None,
) -> Params:
    """`regmean` of models given as stages, holding the Grams of one stage at a time.

    Args:
        params: as for `regmean`.
        stages: of the architecture; see `collect_grams` and, for its memory,
            `gram_memory`.
        carries: per model, the batches of its own data that the first stage reads.
        weights: see `regmean`.
        shrinkage: see `regmean`.
        ridge: see `regmean`.
        on_stage: called with the number of stages done, for a progress bar.

    Raises:
        ValueError: as `regmean`.

    Example:
        >>> from emfuse_jax.merging import Stage
        >>> stage = Stage((), lambda p, x: (x @ p["w"], {"x": (x, None)}), {"w": "x"})
        >>> experts = [{"w": jnp.eye(2)}, {"w": 3 * jnp.eye(2)}]
        >>> first, second = jnp.array([[9.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 9.0]])
        >>> merged = regmean_streamed(experts, [stage], [[first], [second]], shrinkage=0.0)
        >>> [f"{x:.2f}" for x in jnp.diag(merged["w"])]  # each is believed where its inputs are
        ['1.02', '2.98']
    """
    check_same_architecture(params)
    options = {"weights": weights, "shrinkage": shrinkage, "ridge": ridge}
    merged = model_soup(params, weights)
    streams = [
        collect_grams(stages, tree, own)
        for tree, own in zip(params, carries, strict=True)
    ]
    for index, grams in enumerate(zip(*streams, strict=True)):
        merged = replace_leaves(merged, merge_layers(params, grams, **options))
        if on_stage is not None:
            on_stage(index + 1)
    return merged


def merge_layers(
    params: Sequence[Params],
    grams: Sequence[Grams],
    *,
    weights: Any = None,
    shrinkage: float = 0.1,
    ridge: float = 0.0,
) -> dict[str, Array]:
    """The merged kernels alone, by name; see `regmean`.

    Example:
        >>> from emfuse_jax.merging.grams import gram
        >>> trees = [{"w": jnp.array([[1.0]]), "b": 0.0}, {"w": jnp.array([[4.0]]), "b": 0.0}]
        >>> grams = [{"w": gram(jnp.ones((5, 1)))}, {"w": gram(jnp.full((5, 1), 0.5))}]
        >>> list(merge_layers(trees, grams))
        ['w']
    """
    check_same_architecture(params)
    leaves = [named_leaves(tree) for tree in params]
    _check_grams(leaves, grams, ridge)
    options = {"weights": weights, "shrinkage": shrinkage, "ridge": ridge}
    merged = {}
    for names in _sharing(grams):
        own = [each[names[0]] for each in grams]
        flat = [
            np.concatenate([_matrix(name, each[name], gram) for name in names], axis=-1)
            for each, gram in zip(leaves, own, strict=True)
        ]
        try:
            joined = _merge_stack(flat, own, **options)
        except ValueError as error:
            raise ValueError(f"{', '.join(names)}: {error}") from error
        sizes = [
            np.prod(leaves[0][n].shape) // np.prod(flat[0].shape[:-1]) for n in names
        ]
        parts = np.split(joined, np.cumsum(sizes)[:-1], axis=-1)
        for name, part in zip(names, parts, strict=True):
            dtype = jnp.result_type(*(each[name] for each in leaves))
            merged[name] = jnp.asarray(part.reshape(leaves[0][name].shape), dtype)
    return merged


def _merge_stack(
    kernels: Sequence[np.ndarray], grams: Sequence[Gram], **options: Any
) -> np.ndarray:
    """`merge_linear`, layer by layer along the leading axes of ``[*stack, in, out]``."""
    merged = np.empty(kernels[0].shape, kernels[0].dtype)
    for index in np.ndindex(*kernels[0].shape[:-2]):
        means = [gram.total[index] / gram.num_rows[index] for gram in grams]
        merged[index] = merge_linear([k[index] for k in kernels], means, **options)
    return merged


def _sharing(grams: Sequence[Grams]) -> list[list[str]]:
    """Names in groups that share their Grams: they are solved by one factorisation."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in grams[0]:
        key = tuple(id(each[name].total) for each in grams)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _matrix(name: str, kernel: Any, gram: Gram) -> np.ndarray:
    """A kernel as ``[*stack, in, out]``, float64."""
    stack, width = gram.total.shape[:-2], gram.total.shape[-1]
    shape = tuple(kernel.shape)
    rest = shape[len(stack) :]
    sizes = np.cumprod(rest[:-1])
    if shape[: len(stack)] != stack or width not in sizes:
        raise ValueError(
            f"the Gram of {name} has shape {list(gram.total.shape)}, the kernel "
            f"{list(shape)}; expected [*stack, in, in] for [*stack, *in, *out]"
        )
    return np.asarray(kernel, np.float64).reshape(*stack, width, -1)


def _check_grams(
    leaves: Sequence[Mapping[str, Any]], grams: Sequence[Grams], ridge: float
) -> None:
    if len(grams) != len(leaves):
        raise ValueError(f"{len(leaves)} models and {len(grams)} sets of Grams")
    for index, each in enumerate(grams):
        if set(each) != set(grams[0]):
            odd = sorted(set(each) ^ set(grams[0]))
            raise ValueError(
                f"only one of model {index} and model 0 has Grams of {', '.join(odd)}; "
                "measure the same layers of all"
            )
        for name, own in each.items():
            if name not in leaves[0]:
                raise ValueError(
                    f"a Gram is named {name!r}, and no leaf is; leaves have names such as "
                    f"{', '.join(list(leaves[0])[:3])}"
                )
            rows, width = float(np.min(np.asarray(own.num_rows))), own.total.shape[-1]
            if rows < 1 or (rows < width and not ridge > 0.0):
                raise ValueError(
                    f"the Gram of {name} in model {index} was measured on {rows:.0f} rows "
                    f"and has {width} inputs; measure on at least {width}, or give a ridge "
                    "such as 1e-4, which pulls towards the mean where nothing was measured"
                )
