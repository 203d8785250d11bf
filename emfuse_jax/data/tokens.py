"""Packed tokens: documents one after another, and windows drawn from several domains.

Documents are joined with one separator before each and one at the end, and windows are cut
anywhere in the stream, so that no token is padding. A window may hold the end of one
document and the beginning of the next; the separator between them says so.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from emfuse_jax.base import Key

SEPARATOR = "<|endoftext|>"
"""Before, between and after documents: the beginning and the end of a text."""


class TokenStreams(NamedTuple):
    """Tokens by domain, the shorter streams filled up with zeros that are not drawn.

    Equal shapes whatever is trained on, so that a base and its experts, which differ in
    ``shares`` only, are one compiled program.
    """

    tokens: Int[Array | np.ndarray, "domain length"]
    num_tokens: Int[Array | np.ndarray, "domain"]
    shares: Float[Array | np.ndarray, "domain"]


def pack_documents(
    documents: Sequence[Sequence[int]], separator: int
) -> Int[np.ndarray, "length"]:
    """Joins documents into one stream.

    Example:
        >>> pack_documents([[5, 6], [7]], 0).tolist()
        [0, 5, 6, 0, 7, 0]
    """
    stream = [separator]
    for tokens in documents:
        stream.extend(tokens)
        stream.append(separator)
    return np.asarray(stream, np.int32)


def token_streams(
    streams: Sequence[Any], *, shares: Sequence[float] | None = None, window: int
) -> TokenStreams:
    """Streams of several domains as one array.

    Args:
        streams: ``[length]`` tokens each.
        shares: how much of every batch each domain is; None: equal parts.
        window: tokens per window that will be drawn.

    Raises:
        ValueError: if a stream is shorter than a window, or the shares are of another
            count, negative or all zero.

    Example:
        >>> streams = token_streams([[1, 2, 3], [4, 5, 6, 7, 8]], window=3)
        >>> streams.num_tokens.tolist(), streams.shares.tolist()
        ([3, 5], [0.5, 0.5])
    """
    lengths = [len(stream) for stream in streams]
    for index, length in enumerate(lengths):
        if length < window:
            raise ValueError(
                f"domain {index} has {length} tokens, a window {window}; give more text "
                "or a smaller window"
            )
    given = np.ones(len(streams)) if shares is None else np.asarray(shares, float)
    if given.shape != (len(streams),) or not given.sum() > 0 or given.min() < 0:
        raise ValueError(
            f"shares={given.tolist()}; expected {len(streams)} that are not negative and "
            "not all zero"
        )
    tokens = np.zeros((len(streams), max(lengths)), np.int32)
    for row, stream in zip(tokens, streams, strict=True):
        row[: len(stream)] = stream
    return TokenStreams(
        tokens=tokens,
        num_tokens=np.asarray(lengths, np.int32),
        shares=np.asarray(given / given.sum(), np.float32),
    )


def sample_token_windows(
    key: Key, streams: TokenStreams, *, batch_size: int, window: int
) -> Int[Array, "batch window"]:
    """Windows from anywhere in the streams, a domain drawn by its share for each.

    Args:
        key: consumed.
        streams: see `token_streams`; an argument of the jitted function, or the text
            becomes its constant.
        batch_size: windows.
        window: tokens in each.

    Example:
        >>> streams = token_streams([[1, 2, 3], [4, 5, 6]], shares=[0.0, 1.0], window=3)
        >>> @jax.jit
        ... def draw(key, streams):
        ...     return sample_token_windows(key, streams, batch_size=2, window=3)
        >>> draw(jax.random.key(0), streams).tolist()
        [[4, 5, 6], [4, 5, 6]]
    """
    key_domain, key_start = jax.random.split(key)
    log_shares = jnp.log(jnp.asarray(streams.shares))
    domain = jax.random.categorical(key_domain, log_shares, shape=(batch_size,))
    last = jnp.asarray(streams.num_tokens)[domain] - window
    start = jax.random.randint(key_start, (batch_size,), 0, last + 1)
    columns = start[:, None] + jnp.arange(window)[None]
    return jnp.asarray(streams.tokens)[domain[:, None], columns]


def train_bpe(texts: Sequence[str], vocab_size: int) -> str:
    """Trains a byte-level BPE tokenizer.

    Every text can be encoded, and decoding gives it back byte for byte. The separator is
    token 0, then come the 256 bytes, then the merges: a ``vocab_size`` of 257 is a plain
    byte tokenizer.

    Args:
        texts: to count pairs in.
        vocab_size: at least 257; fewer merges are made if the texts have no more.

    Returns:
        The contents of a ``tokenizer.json``.

    Raises:
        ValueError: if ``vocab_size`` is below 257.
        ImportError: if ``tokenizers`` is not installed.

    References:
        Radford, Wu, Child, Luan, Amodei & Sutskever, Language Models are Unsupervised
        Multitask Learners, 2019 (section 2.2).

    Example:
        >>> import json
        >>> made = json.loads(train_bpe(["low lower lowest"] * 10, 300))
        >>> made["model"]["merges"][0]  # the commonest pair
        ['l', 'o']
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size={vocab_size}; expected at least 257, the bytes and the separator"
        )
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "training a tokenizer needs tokenizers: pip install emfuse_jax[llm]"
        ) from error
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    # Where special tokens are asked for, a text begins as it did in training.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, 0)]
    )
    return tokenizer.to_str(pretty=True)
