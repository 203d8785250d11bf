"""What gymnasium's classes say of the MuJoCo environments."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MujocoSpec:
    """What gymnasium's classes say of one environment.

    Attributes:
        xml: model file by version.
        frame_skip: simulator steps per control step.
        velocity_clip: bound on the observed velocities.
        reset_noise: scale of the noise on the initial state.
        normal_velocity_noise: initial velocities are normal instead of uniform.
        control_cost: weight of the squared action.
        alive_bonus: reward per step for not having fallen.
        healthy: ``(qpos, qvel) -> bool`` rows, or None where an episode never ends.
    """

    xml: dict[str, str]
    frame_skip: int
    velocity_clip: float
    reset_noise: float
    normal_velocity_noise: bool
    control_cost: float
    alive_bonus: float
    healthy: Callable[[np.ndarray, np.ndarray], np.ndarray] | None


def _hopper_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    state = np.concatenate([qpos, qvel], axis=-1)[..., 2:]
    inside = np.all(np.abs(state) < 100.0, axis=-1)
    return inside & (qpos[..., 1] > 0.7) & (np.abs(qpos[..., 2]) < 0.2)


def _walker2d_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    height, angle = qpos[..., 1], qpos[..., 2]
    return (height > 0.8) & (height < 2.0) & (np.abs(angle) < 1.0)


ENVIRONMENTS = {
    "hopper": MujocoSpec(
        xml={"v4": "hopper.xml", "v5": "hopper.xml"},
        frame_skip=4,
        velocity_clip=10.0,
        reset_noise=5e-3,
        normal_velocity_noise=False,
        control_cost=1e-3,
        alive_bonus=1.0,
        healthy=_hopper_healthy,
    ),
    "walker2d": MujocoSpec(
        xml={"v4": "walker2d.xml", "v5": "walker2d_v5.xml"},
        frame_skip=4,
        velocity_clip=10.0,
        reset_noise=5e-3,
        normal_velocity_noise=False,
        control_cost=1e-3,
        alive_bonus=1.0,
        healthy=_walker2d_healthy,
    ),
    "halfcheetah": MujocoSpec(
        xml={"v4": "half_cheetah.xml", "v5": "half_cheetah.xml"},
        frame_skip=5,
        velocity_clip=math.inf,
        reset_noise=0.1,
        normal_velocity_noise=True,
        control_cost=0.1,
        alive_bonus=0.0,
        healthy=None,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Physics:
    """Factors on the stock physics; all 1 is gymnasium's.

    Attributes:
        gravity: on the gravity vector.
        friction: on the sliding friction of every geom.
        mass: on all masses and inertias.
        damping: on the joints' damping.
        gear: on the motors' gear ratio (strength).
    """

    gravity: float = 1.0
    friction: float = 1.0
    mass: float = 1.0
    damping: float = 1.0
    gear: float = 1.0


def check_environment(name: str) -> MujocoSpec:
    """The table's row.

    Raises:
        ValueError: for an environment that is not in `ENVIRONMENTS`; lists those that
            are.

    Example:
        >>> check_environment("swimmer")
        Traceback (most recent call last):
            ...
        ValueError: unknown environment 'swimmer'; known: ...
    """
    if name not in ENVIRONMENTS:
        raise ValueError(
            f"unknown environment {name!r}; known: {', '.join(ENVIRONMENTS)}. Data of "
            "other environments can be trained on, but not simulated here"
        )
    return ENVIRONMENTS[name]
