"""Settings of QGPO."""

import dataclasses
from typing import Literal

from emfuse_jax._settings import at_least, discounts, positive, rates
from emfuse_jax.policies._guidance import (
    GuidanceConfig,
)
from emfuse_jax.policies._qgpo_losses import (
    LOSSES,
)
from emfuse_jax.policies.diffusion import (
    DiffusionConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QgpoConfig:
    """Settings of `qgpo`.

    Attributes:
        behaviour: the diffusion model of the recorded actions.
        guidance: the energy network and its use.
        loss: contrastive: the published one, exact for very many support actions. split:
            exact for any number, see `split_energy_loss`. regression: on ``-β Q`` of the
            clean action, which learns its mean instead of its log-mean-exp; biased, for
            comparison.
        inverse_temperature: ``β`` of the guidance, 0 or more; in units of the values'
            standard deviation over a state's support where ``normalize_values``.
        target_inverse_temperature: ``β`` of the bootstrap; none: the same.
        normalize_values: divide values by the running standard deviation over support
            actions.
        num_support: actions per state.
        support_rows: states that get support actions in each update.
        support_steps: denoiser evaluations per support action.
        capacity: states in the ring.
        batch_size: states per update of critics and guidance.
        hidden_sizes: of the critics.
        num_critics: size of the ensemble whose minimum is the value.
        learning_rate: Adam, for the critics.
        discount: ``γ``.
        reward_scale: factor on every reward.
        target_update_rate: of the target critics.
        moment_rate: of the running scale of the values.
    """

    behaviour: DiffusionConfig = DiffusionConfig()  # noqa: RUF009
    guidance: GuidanceConfig = GuidanceConfig()  # noqa: RUF009
    loss: Literal["contrastive", "split", "regression"] = "contrastive"
    inverse_temperature: float = 1.0
    target_inverse_temperature: float | None = None
    normalize_values: bool = True
    num_support: int = 16
    support_rows: int = 8
    support_steps: int = 10
    capacity: int = 4096
    batch_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 256)
    num_critics: int = 2
    learning_rate: float = 3e-4
    discount: float = 0.99
    reward_scale: float = 1.0
    target_update_rate: float = 0.005
    moment_rate: float = 0.003

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r}; expected one of {tuple(LOSSES)}")
        for name in ("inverse_temperature", "target_inverse_temperature"):
            value = getattr(self, name)
            if value is not None and not value >= 0.0:
                raise ValueError(
                    f"{name}={value}; expected 0 (the behaviour) or more: a negative one "
                    "prefers bad actions"
                )
        if self.num_support < 4:
            raise ValueError(
                f"num_support={self.num_support}; expected at least 4 actions per state: "
                "few cannot be ranked"
            )
        at_least(self, 1, "support_rows", "support_steps", "batch_size")
        if self.capacity < self.support_rows:
            raise ValueError(
                f"capacity={self.capacity} holds fewer states than one update adds; "
                f"expected at least support_rows={self.support_rows}"
            )
        discounts(self)
        rates(self, "target_update_rate", "moment_rate")
        positive(self, "learning_rate", "reward_scale")
