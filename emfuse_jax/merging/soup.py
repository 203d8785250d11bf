"""Model soups: the mean of several models' parameters as one model.

Of one architecture only, and of use only where training started from one model (or stayed
in one basin): the mean of two unrelated networks is no network in particular. Where that
fails, the pool of the experts' energies still works, at the cost of running each of them.

Reference:
    Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
    accuracy without increasing inference time", ICML 2022, arXiv:2203.05482.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from emfuse_jax.base import Params
from emfuse_jax.energy import check_weights


def model_soup(params: Sequence[Params], weights: Any = None) -> Params:
    """``Σ_i w_i θ_i``, leaf by leaf.

    Added up in float32 (float64 for float64 leaves), given back in the leaves' dtype.

    Args:
        params: one tree per model, of one structure and the same shapes.
        weights: ``[model]``, non-negative and summing to one; None is uniform.

    Raises:
        ValueError: if there is no model, one is of another architecture (the first leaf
            that differs is named), a leaf is not floating, or the weights are no convex
            combination.

    Example:
        >>> ones, threes = {"w": jnp.ones(2)}, {"w": jnp.full(2, 3.0)}
        >>> model_soup([ones, threes])["w"].tolist()
        [2.0, 2.0]
        >>> model_soup([ones, threes], [0.75, 0.25])["w"].tolist()
        [1.5, 1.5]
    """
    check_same_architecture(params)
    shares = convex_weights(weights, len(params))

    def mean(*leaves: Any) -> jax.Array:
        dtype = jnp.result_type(*leaves)
        wide = jnp.promote_types(dtype, jnp.float32)
        # One after another: a stack would hold every model's leaf a second time.
        terms = (w * jnp.asarray(x, wide) for w, x in zip(shares, leaves, strict=True))
        return functools.reduce(operator.add, terms).astype(dtype)

    rows = zip(*(jax.tree.leaves(tree) for tree in params), strict=True)
    merged = [mean(*leaves) for leaves in rows]
    return jax.tree.unflatten(jax.tree.structure(params[0]), merged)


class GreedySoup(NamedTuple):
    """What `greedy_soup` found.

    Attributes:
        params: the soup's.
        members: who is in it, in the order in which they were added.
        score: the soup's.
        scores: each model's own, in the order given.
    """

    params: Params
    members: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def greedy_soup(
    params: Sequence[Params], score_fn: Callable[[Params], float]
) -> GreedySoup:
    """The greedy soup: a model joins where the score does not fall (recipe 1).

    The models are tried from the best to the worst by their own score, equals in the
    order given; each joins if the uniform soup of the members and it scores at least what
    the members' soup does. So the soup is never worse, by ``score_fn``, than its best
    model. Score on held-out data: on the training data the best model only looks best.

    Args:
        params: one tree per model, as for `model_soup`.
        score_fn: ``params -> score``, higher is better; NaN is the worst. Called
            ``2 n - 1`` times.

    Raises:
        ValueError: as `model_soup`, or if no model has a score.

    Example:
        >>> trees = [{"w": jnp.array(w)} for w in (0.0, 4.0, 9.0)]
        >>> soup = greedy_soup(trees, lambda tree: -abs(float(tree["w"]) - 2.0))
        >>> soup.members, float(soup.params["w"])
        ((0, 1), 2.0)
    """
    check_same_architecture(params)

    def score(tree: Params) -> float:
        value = float(score_fn(tree))
        return -math.inf if math.isnan(value) else value

    scores = [score(tree) for tree in params]
    if max(scores) == -math.inf:
        raise ValueError(
            f"no model has a score: score_fn gave {scores}; it must be a number for at "
            "least one of them, higher for better"
        )
    order = sorted(range(len(params)), key=lambda index: -scores[index])
    members, best, soup = [order[0]], scores[order[0]], params[order[0]]
    for index in order[1:]:
        candidate = model_soup([params[member] for member in [*members, index]])
        value = score(candidate)
        if value >= best:
            members, best, soup = [*members, index], value, candidate
    return GreedySoup(soup, tuple(members), best, tuple(scores))


def check_same_architecture(
    params: Sequence[Params], names: Sequence[str] | None = None
) -> None:
    """Refuses trees that cannot be averaged leaf by leaf.

    Args:
        params: one tree per model.
        names: what error texts call the models; None is ``model 0``, ``model 1`` ….

    Raises:
        ValueError: naming the first leaf that differs in presence or shape, or that is
            not floating.

    Example:
        >>> check_same_architecture([{"w": jnp.ones(2)}, {"w": jnp.ones(3)}])
        Traceback (most recent call last):
            ...
        ValueError: ...
    """
    if not params:
        raise ValueError("no models to merge; expected at least one")
    names = names or [f"model {index}" for index in range(len(params))]
    shapes = [_describe(tree, name) for tree, name in zip(params, names, strict=True)]
    for name, shape in zip(names, shapes, strict=True):
        for leaf in dict.fromkeys([*shapes[0], *shape]):
            here, there = shape.get(leaf, "absent"), shapes[0].get(leaf, "absent")
            if here != there:
                raise ValueError(
                    f"leaf {leaf} is {here} in {name}, {there} in {names[0]}; only "
                    "models of one architecture can be merged: fuse the others by energy"
                )


def _describe(tree: Params, name: str) -> dict[str, str]:
    """Shapes by leaf; refuses leaves that have no mean."""
    found = {}
    for leaf, value in named_leaves(tree).items():
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise ValueError(
                f"leaf {leaf} is {jnp.result_type(value)} in {name}; only floating "
                "leaves can be merged: leave counters and keys out of the parameters"
            )
        found[leaf] = str(list(jnp.shape(value)))
    return found


def convex_weights(weights: Any, num_models: int) -> list[Any]:
    """One number per model; uniform for None.

    Raises:
        ValueError: if they are no convex combination.

    Example:
        >>> [float(weight) for weight in convex_weights(None, 4)]
        [0.25, 0.25, 0.25, 0.25]
    """
    if weights is None:
        return [1.0 / num_models] * num_models
    checked = check_weights(weights, num_models)
    if checked.ndim != 1:
        raise ValueError(
            f"weights have shape {checked.shape}, expected [model] = ({num_models},)"
        )
    # As Python's own numbers, which take the precision of what they multiply.
    given = checked if isinstance(weights, Tracer) else np.asarray(weights, np.float64)
    return list(given) if isinstance(weights, Tracer) else given.tolist()


def named_leaves(tree: Params) -> dict[str, Any]:
    """Leaves by dotted path, such as ``layers.0.q``, in the tree's order.

    Example:
        >>> list(named_leaves({"layers": [{"q": 1.0}, {"q": 2.0}], "norm": 3.0}))
        ['layers.0.q', 'layers.1.q', 'norm']
    """
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {leaf_name(path): leaf for path, leaf in found}


def leaf_name(path: Any) -> str:
    """The dotted name of a path of jax's key objects.

    Example:
        >>> paths = jax.tree_util.tree_leaves_with_path({"layers": [{"q": 1.0}]})
        >>> leaf_name(paths[0][0])
        'layers.0.q'
    """
    return jax.tree_util.keystr(path, simple=True, separator=".")


def replace_leaves(tree: Params, leaves: Mapping[str, Any]) -> Params:
    """The tree with the leaves of these names exchanged.

    Example:
        >>> replace_leaves({"a": 1.0, "b": 2.0}, {"b": 3.0})
        {'a': 1.0, 'b': 3.0}
    """
    exchanged = [leaves.get(name, leaf) for name, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), exchanged)
