"""What is left of a next-token law before a token is drawn from it.

Filters map logits to logits and make what they drop impossible (``-inf``). They decide
by value alone, so that tokens of equal probability stay or go together and their order
in the vocabulary has no say; at the edge of a filter that can keep more tokens than an
implementation that sorts and cuts. `filter_logits` applies them in the order that
transformers uses: temperature, top-k, top-p, min-p.

References:
    Fan, Lewis, Dauphin, "Hierarchical Neural Story Generation", ACL 2018 (top-k).
    https://arxiv.org/abs/1805.04833
    Holtzman, Buys, Du, Forbes, Choi, "The Curious Case of Neural Text Degeneration",
    ICLR 2020 (top-p, equation 2). https://arxiv.org/abs/1904.09751
    Nguyen, Baker, Neo, Roush, Kirsch, Shwartz-Ziv, "Turning Up the Heat: Min-p Sampling
    for Creative and Coherent LLM Outputs", ICLR 2025. https://arxiv.org/abs/2407.01082
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from emfuse_jax.base import Key
from emfuse_jax.energy import boltzmann_log_prob

__all__ = [
    "check_filters",
    "filter_logits",
    "is_greedy",
    "min_p_filter",
    "sample_token",
    "top_k_filter",
    "top_p_filter",
]


def top_k_filter(
    logits: Float[Array, "*batch vocab"], k: int
) -> Float[Array, "*batch vocab"]:
    """Keeps the ``k`` most likely tokens, and those that tie with the last of them.

    Args:
        logits: or log-probabilities.
        k: static; from the size of the vocabulary on it keeps all.

    Example:
        >>> top_k_filter(jnp.array([1.0, 3.0, 2.0]), 2).tolist()
        [-inf, 3.0, 2.0]
    """
    if k >= logits.shape[-1]:
        return logits
    last = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= last, logits, -jnp.inf)


def top_p_filter(
    logits: Float[Array, "*batch vocab"], p: ArrayLike
) -> Float[Array, "*batch vocab"]:
    """Keeps the fewest tokens, from the most likely down, that hold mass ``p``.

    So a token stays if the tokens that are likelier hold less than ``p``, and the
    likeliest always does.

    Args:
        logits: or log-probabilities.
        p: in (0, 1]; 1 keeps all.

    Example:
        >>> logits = jnp.log(jnp.array([0.5, 0.1, 0.4]))
        >>> [f"{p:.1f}" for p in jnp.exp(top_p_filter(logits, 0.7))]
        ['0.5', '0.0', '0.4']
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probs = jnp.exp(boltzmann_log_prob(-descending))
    likelier = jnp.cumsum(probs, axis=-1) - probs
    last = jnp.sum(likelier < p, axis=-1, keepdims=True) - 1
    threshold = jnp.take_along_axis(descending, jnp.maximum(last, 0), axis=-1)
    # Rounding can fill the sum before its end; 1 is to keep all nevertheless.
    threshold = jnp.where(jnp.asarray(p) >= 1.0, -jnp.inf, threshold)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def min_p_filter(
    logits: Float[Array, "*batch vocab"], p: ArrayLike
) -> Float[Array, "*batch vocab"]:
    """Keeps the tokens that are at least ``p`` times as likely as the likeliest.

    Args:
        logits: or log-probabilities.
        p: in [0, 1]; 0 keeps all.

    Example:
        >>> min_p_filter(jnp.log(jnp.array([1.0, 4.0, 5.0])), 0.5)[0].item()
        -inf
    """
    threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.asarray(p, float))
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def filter_logits(
    logits: Float[Array, "*batch vocab"],
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
) -> Float[Array, "*batch vocab"]:
    """Divides by the temperature, then applies the filters that are asked for.

    Top-p and min-p look at what is left by those before them, renormalised.

    Args:
        logits: of the next token.
        temperature: positive.
        top_k: see `top_k_filter`.
        top_p: see `top_p_filter`.
        min_p: see `min_p_filter`.

    Raises:
        ValueError: if an option is outside its range, or the temperature is 0 (there
            is no law to filter then; `sample_token` takes the likeliest).

    Example:
        >>> filter_logits(jnp.array([2.0, 1.0, 0.0]), temperature=0.5, top_k=2).tolist()
        [4.0, 2.0, -inf]
    """
    check_filters(temperature, top_k, top_p, min_p)
    if is_greedy(temperature):
        raise ValueError(
            "temperature 0 has no law to filter; take the argmax, as sample_token does"
        )
    logits = logits / temperature
    if top_k is not None:
        logits = top_k_filter(logits, top_k)
    if top_p is not None:
        logits = top_p_filter(logits, top_p)
    return logits if min_p is None else min_p_filter(logits, min_p)


def sample_token(
    key: Key,
    logits: Float[Array, "*batch vocab"],
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
) -> Int[Array, "*batch"]:
    """Draws a token from the filtered law; temperature 0 takes the likeliest.

    Where every token is impossible, the first is taken. Of equally likely tokens greedy
    choice takes the first.

    Args:
        key: consumed, but for temperature 0.
        logits: of the next token.
        temperature: not negative. 0 has to be a number, not a traced value.
        top_k: see `top_k_filter`.
        top_p: see `top_p_filter`.
        min_p: see `min_p_filter`.

    Raises:
        ValueError: if an option is outside its range.

    Example:
        >>> logits = jnp.array([[0.0, 9.0, 0.0], [1.0, 0.0, 0.0]])
        >>> sample_token(jax.random.key(0), logits, temperature=0.0).tolist()
        [1, 0]
    """
    if is_greedy(temperature):
        check_filters(temperature, top_k, top_p, min_p)
        return jnp.argmax(logits, axis=-1)
    kept = filter_logits(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    return jax.random.categorical(key, kept, axis=-1)


def is_greedy(temperature: Any) -> bool:
    """Whether the temperature is 0; a traced one never counts as 0.

    Example:
        >>> is_greedy(0), is_greedy(0.7)
        (True, False)
    """
    return _known(temperature) and float(temperature) == 0.0


def check_filters(
    temperature: Any = 1.0, top_k: Any = None, top_p: Any = None, min_p: Any = None
) -> None:
    """Checks the options of decoding on the host; traced values pass unseen.

    Raises:
        ValueError: if one is outside its range; the text says which and what is.

    Example:
        >>> check_filters(temperature=0.7, top_p=0.9)
    """
    if _known(temperature) and not 0 <= float(temperature) < math.inf:
        raise ValueError(
            f"temperature={temperature}; expected a finite number that is not negative "
            "(0 is greedy, 1 the model's own law)"
        )
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(
            f"top_k={top_k!r}; expected a positive integer (1 is greedy, None keeps all)"
        )
    if top_p is not None and _known(top_p) and not 0 < float(top_p) <= 1:
        raise ValueError(f"top_p={top_p}; expected a probability in (0, 1], as 0.9")
    if min_p is not None and _known(min_p) and not 0 <= float(min_p) <= 1:
        raise ValueError(f"min_p={min_p}; expected a ratio in [0, 1], as 0.05")


def _known(value: Any) -> bool:
    return not isinstance(value, Tracer)
