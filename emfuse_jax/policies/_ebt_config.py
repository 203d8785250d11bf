"""Settings of the energy-based transformer policy, and its two published recipes."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from emfuse_jax._settings import at_least, positive
from emfuse_jax.nets.transformer import TransformerConfig
from emfuse_jax.samplers.descent import check_steps, descent

__all__ = ["EbtConfig", "s1_config", "s2_config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EbtConfig:
    """Settings of `ebt_policy`.

    Attributes:
        network: of the transformer, unless a network is passed.
        num_frames: observation frames in an observation, oldest first.
        horizon: actions in a chunk.
        train_steps: fewest steps of a training descent.
        extra_steps: up to this many more, drawn for each batch.
        step_size: of the descent, in the units of an action's coordinate: the energy is
            a mean over ``action_size`` coordinates, so its gradient is multiplied by
            that number too.
        step_size_spread: each row's step size is drawn from ``[η / spread, η · spread]``.
        momentum: Nesterov's, in training and acting.
        detach: no derivative from one step to the one before (S1).
        truncate: score the last step of a descent alone (S2), or all.
        num_starts: training descents per recorded action; the one that ends nearest to it
            is trained on. Ends that are no mixture of modes need more than 1.
        start_noise: range of the noise level ``s`` of a training descent's start,
            ``√(1 - s²) a + s ε`` for the recorded action ``a``; (1, 1) starts at noise.
        noise: standard deviation added before each training step, first and last, on half
            a cosine; (0, 0) adds none.
        normalize: positions by their root mean square: of each sample, of the whole
            ``batch`` (the authors'; one row then changes another's answer), or not.
        energy_scaled: steps in proportion to ``exp(energy)``, the authors'.
        act_steps: most steps of an acting descent.
        tolerance: a row stops acting when its gradient norm is at most this; 0: never.
        num_candidates: descents per action; the one of lowest energy is taken.
        learning_rate: AdamW, after ``warmup_steps`` of linear growth.
        warmup_steps: updates.
        decay_steps: updates until a cosine has brought the rate to 0; none: never.
        weight_decay: AdamW.
        max_gradient_norm: of an update.
        average_power: the moving average of the weights, with which it acts, forgets
            at the rate ``(1 + step)^-power``.
    """

    network: TransformerConfig = TransformerConfig()  # noqa: RUF009
    num_frames: int = 1
    horizon: int = 1
    train_steps: int = 2
    extra_steps: int = 0
    step_size: float = 1.0
    step_size_spread: float = 1.0
    momentum: float = 0.0
    detach: bool = True
    truncate: bool = False
    num_starts: int = 1
    start_noise: tuple[float, float] = (1.0, 1.0)
    noise: tuple[float, float] = (0.2, 0.002)
    normalize: Literal["none", "sample", "batch"] = "none"
    energy_scaled: bool = False
    act_steps: int = 10
    tolerance: float = 0.0
    num_candidates: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay_steps: int | None = None
    weight_decay: float = 1e-6
    max_gradient_norm: float = 1.0
    average_power: float = 0.75

    def __post_init__(self) -> None:
        check_steps("train_steps", self.train_steps)
        check_steps("act_steps", self.act_steps)
        at_least(self, 1, "num_frames", "horizon", "num_starts", "num_candidates")
        at_least(self, 0, "extra_steps", "warmup_steps", "weight_decay")
        at_least(self, 0, "average_power", "tolerance")
        positive(self, "learning_rate", "max_gradient_norm")
        if not (self.step_size > 0 and self.step_size_spread >= 1):
            raise ValueError(
                f"step_size={self.step_size} must be positive and step_size_spread="
                f"{self.step_size_spread} at least 1 (1 draws none)"
            )
        low, high = self.start_noise
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"start_noise={self.start_noise}; expected 0 ≤ low ≤ high ≤ 1"
            )
        if not all(level >= 0 for level in self.noise):
            raise ValueError(f"noise={self.noise} must be at least 0, first and last")
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps={self.decay_steps} must exceed warmup_steps="
                f"{self.warmup_steps}, which it includes"
            )
        # The rest is refused by the descent itself.
        descent(
            lambda x: jnp.sum(x, -1),
            self.step_size,
            momentum=self.momentum,
            normalize=self.normalize,
        )


def s1_config(**settings: Any) -> EbtConfig:
    """S1 of energy-based transformers: one derivative per step, every step scored.

    The step size stays what it is, where the published S1 learns it: a learned energy
    scales its own gradient, so that nothing else is learned by that.

    Example:
        >>> s1_config(train_steps=3).detach
        True
    """
    defaults = {"detach": True, "truncate": False, "start_noise": (1.0, 1.0)}
    return EbtConfig(**{**defaults, **settings})


def s2_config(**settings: Any) -> EbtConfig:
    """S2: derivatives through the whole descent, its end scored, steps and sizes random.

    Every descent starts anew: there is no buffer of where earlier ones ended.

    Example:
        >>> s2_config().step_size_spread
        2.0
    """
    defaults = {
        "detach": False,
        "truncate": True,
        "start_noise": (1.0, 1.0),
        "train_steps": 2,
        "extra_steps": 1,
        "step_size_spread": 2.0,
    }
    return EbtConfig(**{**defaults, **settings})
