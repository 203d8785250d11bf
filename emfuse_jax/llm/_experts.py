"""Experts behind one interface, whether one architecture or several.

Experts of one architecture are one batched step over stacked params; of different ones,
a tuple and a Python loop. Either way their logits come out as laws over one vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from emfuse_jax.base import LanguageModel, State
from emfuse_jax.energy import energy_from_logits
from emfuse_jax.llm.cache import EXPERT_AXES, KvCache
from emfuse_jax.llm.vocabulary import VocabularyMap, map_log_probs, map_tokens


class Experts(NamedTuple):
    """The functions of several language models, called together.

    ``call(name, params, tokens, caches, *data, **options)`` calls that function of every
    expert; tokens and logits are of the reference vocabulary, logits normalised.
    """

    init_cache: Callable[[int, int], State]
    call: Callable[..., tuple[Float[Array, "model *batch vocab"], State]]
    num_models: int
    vocab_size: int
    context_length: int


def gather_experts(
    models: LanguageModel | Sequence[LanguageModel],
    *,
    num_models: int | None,
    temperatures: Any,
    vocabulary: Sequence[VocabularyMap] | None,
) -> Experts:
    """Checks and gathers what `fuse_language_models` was given; see there."""
    if isinstance(models, LanguageModel):
        if num_models is None or num_models < 1:
            raise ValueError(
                f"num_models is {num_models}; with one model say how many experts its "
                "stack of params holds, or give a sequence of models"
            )
        members = [models] * num_models
    else:
        members = list(models)
        if not members:
            raise ValueError(
                "fuse_language_models got no models; expected at least one"
            )
        if num_models not in (None, len(members)):
            raise ValueError(f"num_models is {num_models} for {len(members)} models")
    _check_vocabulary([model.vocab_size for model in members], vocabulary)
    to_log_probs = functools.partial(
        _to_log_probs,
        temperatures=_check_temperatures(temperatures, len(members)),
        vocabulary=vocabulary,
    )
    make = _stacked if isinstance(models, LanguageModel) else _listed
    return make(members, vocabulary, to_log_probs)


def _stacked(
    members: Sequence[LanguageModel], vocabulary: Any, to_log_probs: Callable
) -> Experts:
    model, count = members[0], len(members)

    def init_cache(batch_size: int, length: int) -> State:
        cache = model.init_cache(batch_size, length)
        spread = jax.vmap(
            lambda leaf: leaf,
            in_axes=(None,),
            out_axes=_cache_axes(cache),
            axis_size=count,
        )
        return spread(cache)

    def call(name, params, tokens, caches, *data, **options):
        stacks = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
        if stacks != {(count,)}:
            raise ValueError(
                f"leaves of params have first axes {sorted(stacks)}, expected a stack of "
                f"the {count} experts' params (tree.stack)"
            )

        def one(params, tokens, cache):
            return getattr(model, name)(params, tokens, *data, cache, **options)

        read, axis = tokens, None
        if vocabulary is not None:
            read, axis = jnp.stack(_expert_tokens(vocabulary, tokens, count)), 0
        held = _cache_axes(caches)
        every = jax.vmap(one, in_axes=(0, axis, held), out_axes=(0, held))
        logits, caches = every(params, read, caches)
        return to_log_probs(logits), caches

    return Experts(
        init_cache, call, count, _fused_size(members, vocabulary), model.context_length
    )


def _listed(
    members: Sequence[LanguageModel], vocabulary: Any, to_log_probs: Callable
) -> Experts:
    count = len(members)

    def init_cache(batch_size: int, length: int) -> State:
        return tuple(model.init_cache(batch_size, length) for model in members)

    def call(name, params, tokens, caches, *data, **options):
        if not isinstance(params, tuple | list) or len(params) != count:
            size = len(params) if isinstance(params, tuple | list) else "no"
            raise ValueError(
                f"params are a {type(params).__name__} of {size} experts, expected the "
                f"tuple of the {count} experts' params"
            )
        read = _expert_tokens(vocabulary, tokens, count)
        results = [
            getattr(model, name)(own, seen, *data, cache, **options)
            for model, own, seen, cache in zip(
                members, params, read, caches, strict=True
            )
        ]
        logits, caches = zip(*results, strict=True)
        return to_log_probs(logits), caches

    size = _fused_size(members, vocabulary)
    length = min(model.context_length for model in members)
    return Experts(init_cache, call, count, size, length)


def _cache_axes(cache: State) -> Any:
    return EXPERT_AXES if isinstance(cache, KvCache) else 0


def _fused_size(members: Sequence[LanguageModel], vocabulary: Any) -> int:
    return vocabulary[0].reference_size if vocabulary else members[0].vocab_size


def _expert_tokens(vocabulary: Any, tokens: jax.Array, count: int) -> list[jax.Array]:
    if vocabulary is None:
        return [tokens] * count
    return [map_tokens(mapping, tokens) for mapping in vocabulary]


def _to_log_probs(
    logits: Sequence[jax.Array] | jax.Array,
    *,
    temperatures: np.ndarray | None,
    vocabulary: Sequence[VocabularyMap] | None,
) -> Float[Array, "model *batch vocab"]:
    """The experts' laws over the fusion's vocabulary, from their logits."""
    if vocabulary is None:
        every = logits if isinstance(logits, jax.Array) else jnp.stack(logits)
        every = every.astype(jnp.promote_types(every.dtype, jnp.float32))
        if temperatures is None:
            return -energy_from_logits(every)
        return -jax.vmap(lambda z, tau: energy_from_logits(z, temperature=tau))(
            every, jnp.asarray(temperatures, every.dtype)
        )
    laws = []
    for index, mapping in enumerate(vocabulary):
        own = logits[index][..., : mapping.expert_size]
        own = own.astype(jnp.promote_types(own.dtype, jnp.float32))
        temperature = 1.0 if temperatures is None else float(temperatures[index])
        law = -energy_from_logits(own, temperature=temperature)
        laws.append(map_log_probs(mapping, law))
    return jnp.stack(laws)


def _check_temperatures(temperatures: Any, count: int) -> np.ndarray | None:
    if temperatures is None:
        return None
    values = np.asarray(temperatures, np.float32)
    if values.shape != (count,):
        raise ValueError(
            f"temperatures have shape {values.shape}, expected one for each of the "
            f"{count} experts"
        )
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(
            f"temperatures {values.tolist()}, expected positive numbers (1 leaves an "
            "expert as it is)"
        )
    return values


def _check_vocabulary(
    sizes: Sequence[int], vocabulary: Sequence[VocabularyMap] | None
) -> None:
    if vocabulary is None:
        if len(set(sizes)) > 1:
            raise ValueError(
                f"the experts' vocabularies have {list(sizes)} tokens and no mapping was "
                "given; map them onto one with align_vocabularies([tokenizer.vocab() for "
                "each]) and pass that as `vocabulary`"
            )
        return
    if len(vocabulary) != len(sizes):
        raise ValueError(
            f"vocabulary has {len(vocabulary)} maps, expected one for each of the "
            f"{len(sizes)} experts"
        )
    references = {mapping.reference_size for mapping in vocabulary}
    if len(references) > 1:
        raise ValueError(
            f"the maps in vocabulary lead to {sorted(references)} tokens, expected one "
            "reference for all"
        )
    for index, (mapping, size) in enumerate(zip(vocabulary, sizes, strict=True)):
        if mapping.expert_size > size:
            raise ValueError(
                f"the map of expert {index} is for {mapping.expert_size} tokens, the "
                f"model has {size}; give the maps in the order of the models, and "
                "tokenizers that have no token beyond their model's embedding"
            )
