"""Rotary position embeddings of the Llama and Qwen families.

A pair of coordinates ``(i, i + head_dim / 2)`` of a query or a key at position ``t`` is
turned by the angle ``t · f_i`` with ``f_i = theta^(-2i / head_dim)`` (Su et al. 2021, "RoFormer",
arXiv 2104.09864, in the half-split order of the published checkpoints). Context
extensions change the frequencies: ``linear`` divides all of them (Chen et al. 2023,
arXiv 2306.15595); ``llama3`` divides those whose wavelength is long beside the original
context, with a ramp between; ``yarn`` does so by the number of rotations and scales the
attention (Peng et al. 2023, arXiv 2309.00071, equations 16 to 24).
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Settings of the rotary embedding.

    Attributes:
        kind: how the context was extended; the fields below say who reads them.
        theta: base of the wavelengths.
        factor: of the extension (all kinds but ``default``).
        original_length: context before the extension, in tokens (``llama3``, ``yarn``).
        low_frequency_factor: wavelengths above ``original_length`` over this are divided
            by ``factor`` (``llama3``).
        high_frequency_factor: those below ``original_length`` over this are kept
            (``llama3``).
        beta_fast: rotations over ``original_length`` above which a frequency is kept
            (``yarn``).
        beta_slow: and below which it is divided by ``factor`` (``yarn``).
        truncate: round the ends of that ramp outwards to whole dimensions (``yarn``).
        attention_factor: multiplies queries and keys; None is ``0.1 ln(factor) + 1``
            (``yarn``).
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_length: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(
                f"rope kind {self.kind!r} is not supported; expected one of "
                f"{', '.join(ROPE_KINDS)}"
            )
        if not self.theta > 0:
            raise ValueError(f"rope theta={self.theta}; expected a positive number")
        if not self.factor >= 1:
            raise ValueError(f"rope factor={self.factor}; expected at least 1")
        if self.kind in ("llama3", "yarn") and not (self.original_length or 0) > 0:
            raise ValueError(
                f"rope kind {self.kind!r} needs original_length, the context in tokens "
                f"before the extension; got {self.original_length}"
            )
        if not self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"rope low_frequency_factor={self.low_frequency_factor} is not below "
                f"high_frequency_factor={self.high_frequency_factor}"
            )


class Rotation(NamedTuple):
    """Cosines and sines of the angles, times the attention factor."""

    cos: Float[Array, "batch time half"]
    sin: Float[Array, "batch time half"]


def frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per token ``[head_dim / 2]``, fastest first.

    In float32 throughout, as the checkpoints were trained: at position 8000 the last bit
    of a frequency is worth 5e-4 radians.

    Example:
        >>> frequencies(RopeConfig(), 4)
        array([1.  , 0.01], dtype=float32)
        >>> frequencies(RopeConfig(kind="linear", factor=4.0), 4)
        array([0.25  , 0.0025], dtype=float32)
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = np.float32(rope.theta) ** exponent
    plain = np.float32(1) / wavelength
    factor = np.float32(rope.factor)
    if rope.kind == "linear":
        return plain / factor
    if rope.kind == "llama3":
        return _llama3(rope, plain, factor)
    if rope.kind == "yarn":
        kept = 1 - _ramp(*_yarn_range(rope, head_dim), head_dim // 2)
        return (1 - kept) * (np.float32(1) / (factor * wavelength)) + kept * plain
    return plain


def _llama3(rope: RopeConfig, plain: np.ndarray, factor: np.float32) -> np.ndarray:
    length, low, high = (
        np.float32(x or 0)
        for x in (
            rope.original_length,
            rope.low_frequency_factor,
            rope.high_frequency_factor,
        )
    )
    wavelength = np.float32(2 * math.pi) / plain
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    slow, fast = wavelength > length / low, wavelength < length / high
    return np.where(slow, plain / factor, np.where(fast, plain, between))


def _yarn_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Dimensions between which YaRN's ramp runs (equation 17, solved for the dimension)."""

    def dimension(rotations: float) -> float:
        length = rope.original_length or 0
        ratio = math.log(length / (rotations * 2 * math.pi)) / math.log(rope.theta)
        return head_dim * ratio / 2

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(float(low), 0.0), min(float(high), head_dim - 1.0)


def _ramp(low: float, high: float, size: int) -> np.ndarray:
    if low == high:
        high += 1e-3  # a step, without a division by zero
    line = (np.arange(size, dtype=np.float32) - np.float32(low)) / np.float32(
        high - low
    )
    return np.clip(line, np.float32(0), np.float32(1))


def attention_factor(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied with; 1 for all kinds but ``yarn``.

    Example:
        >>> attention_factor(RopeConfig())
        1.0
        >>> round(attention_factor(RopeConfig(kind="yarn", factor=4.0, original_length=8192)), 4)
        1.1386
    """
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0


def rotation(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "batch time"]
) -> Rotation:
    """The rotation at each position; every layer shares it.

    Example:
        >>> by = rotation(RopeConfig(), 8, jnp.array([[0, 1]]))
        >>> by.cos.shape  # a cosine per pair of coordinates
        (1, 2, 4)
    """
    per_token = jnp.asarray(frequencies(rope, head_dim))
    angles = positions[..., None].astype(jnp.float32) * per_token[None, None]
    scale = attention_factor(rope)
    return Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rotate(
    x: Float[Array, "batch head time head_dim"], by: Rotation
) -> Float[Array, "batch head time head_dim"]:
    """Turns the pairs ``(x_i, x_{i + head_dim / 2})``, in float32.

    Example:
        >>> x = jnp.ones((1, 1, 2, 4))
        >>> turned = rotate(x, rotation(RopeConfig(), 4, jnp.array([[0, 7]])))
        >>> turned[0, 0, 0].tolist()  # position 0: as it was
        [1.0, 1.0, 1.0, 1.0]
        >>> [f"{n:.3f}" for n in jnp.linalg.norm(turned, axis=-1)[0, 0]]  # turned, not stretched
        ['2.000', '2.000']
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = by.cos[:, None], by.sin[:, None]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
