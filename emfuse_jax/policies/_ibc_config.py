"""Settings of implicit cloning, and what they cost."""

import dataclasses
from typing import Literal

from emfuse_jax._settings import at_least, positive, rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class IbcConfig:
    """Settings of `ibc`; lengths are in the box scaled to [-1, 1].

    Attributes:
        hidden_sizes: of the energy, unless a network is passed.
        learning_rate: Adam.
        decay: factor of the learning rate every 100 updates; 1 keeps it.
        negatives: where they come from: uniform in the box, langevin chains on the
            energy from uniform starts, or a proposal of known density.
        num_negatives: per recorded action.
        ranking_correction: subtract the proposal's log-density from the logits.
        penalty: weight of the gradient penalty, on all candidates; 0 for none. Published
            with Langevin negatives, at the last step of their chains.
        margin: largest slope that costs nothing, in the maximum norm.
        chain_steps: Langevin steps, of negatives and of acting.
        first_step: rate of a chain's first step.
        last_step: rate of its last.
        noise: factor of a chain's noise, which is multiplied by the rate.
        step_clip: largest move of a coordinate in a step.
        inference: how to act: langevin or derivative_free.
        num_samples: candidates per action.
        second_pass: follow the chains by as many steps at the last rate and half the
            noise.
        search_steps: resampling steps of the derivative-free search.
        search_noise: standard deviation of its first noise, halved in every step.
    """

    hidden_sizes: tuple[int, ...] = (256, 256)
    learning_rate: float = 1e-3
    decay: float = 0.99
    negatives: Literal["uniform", "langevin", "proposal"] = "langevin"
    num_negatives: int = 8
    ranking_correction: bool = False
    penalty: float = 1.0
    margin: float = 1.0
    chain_steps: int = 100
    first_step: float = 0.1
    last_step: float = 1e-5
    noise: float = 1.0
    step_clip: float = 0.1
    inference: Literal["langevin", "derivative_free"] = "langevin"
    num_samples: int = 512
    second_pass: bool = False
    search_steps: int = 3
    search_noise: float = 0.33

    def __post_init__(self) -> None:
        choices = {
            "negatives": ("uniform", "langevin", "proposal"),
            "inference": ("langevin", "derivative_free"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; expected one of {allowed}"
                )
        counts = ("num_negatives", "chain_steps", "num_samples", "search_steps")
        at_least(self, 1, *counts)
        at_least(self, 0, "penalty", "margin", "noise", "search_noise")
        positive(self, "learning_rate", "first_step", "last_step", "step_clip")
        rates(self, "decay")
        if self.ranking_correction and self.negatives == "langevin":
            raise ValueError(
                "ranking_correction needs the density of the negatives, which chains on "
                "the energy do not have; take negatives='proposal', or 'uniform'"
            )


def evaluations_per_action(config: IbcConfig) -> tuple[int, int]:
    """Energies and gradients of energies that one action takes, in rows of the network.

    Example:
        >>> evaluations_per_action(
        ...     IbcConfig(inference="derivative_free", num_samples=256, search_steps=3)
        ... )
        (1024, 0)
    """
    if config.inference == "derivative_free":
        return config.num_samples * (config.search_steps + 1), 0
    steps = config.chain_steps * (2 if config.second_pass else 1)
    return config.num_samples, config.num_samples * steps
