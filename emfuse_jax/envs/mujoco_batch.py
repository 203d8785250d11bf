"""Batched C MuJoCo on gymnasium's own models: the reference physics for data and
scores.

Observations equal gymnasium's bit for bit (a test says so), for the v4 and the v5
rewards. The versions differ in two places: v4 pays Hopper and Walker2d their alive
bonus on the step on which they fall, v5 does not; and v5's Walker2d has more friction
under one foot.

Needs `mujoco` and `gymnasium` (for its XML files), imported on first use.
"""

import dataclasses
import importlib
import importlib.util
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from emfuse_jax.base import SpaceSpec
from emfuse_jax.envs.mujoco_table import (
    Physics,
    check_environment,
)


class BatchState(NamedTuple):
    """Everything that decides what a `MujocoBatch` does next, as arrays.

    ``simulator [env, size]`` float64 is MuJoCo's integration state (positions,
    velocities, warm start, time, controls); ``generator [env, 6]`` uint64 the reset
    noise's generators.
    """

    simulator: np.ndarray
    generator: np.ndarray


class MujocoBatch:
    """``num_envs`` copies of one environment, stepped together on the host.

    Nothing resets itself: `step` reports the true next observation and whether the
    episode has terminated, the caller resets and keeps the time limit.

    Environment 0 with seed ``s`` draws the same initial states as gymnasium's
    environment after ``reset(seed=s)``; the others draw from streams of their own.

    Args:
        name: one of `ENVIRONMENTS`.
        num_envs: copies.
        version: gymnasium's reward version, ``"v4"`` or ``"v5"``.
        physics: changes to the stock physics.
        seed: of the initial states.

    Raises:
        ValueError: for an unknown name or version, a count or a factor that is not
            positive.

    Example:
        >>> env = MujocoBatch("hopper", 2)
        >>> observation = env.reset()
        >>> next_observation, reward, terminated = env.step(np.zeros((2, 3), np.float32))
        >>> next_observation.shape, reward.shape, terminated.tolist()
        ((2, 11), (2,), [False, False])
    """

    def __init__(
        self,
        name: str,
        num_envs: int,
        *,
        version: str = "v4",
        physics: Physics | None = None,
        seed: int = 0,
    ) -> None:
        self.table = check_environment(name)
        if version not in self.table.xml:
            raise ValueError(
                f"version={version!r}; expected one of {', '.join(self.table.xml)}"
            )
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs}; expected at least 1")
        self.name, self.num_envs, self.version = name, num_envs, version
        self.physics = physics or Physics()
        self.model = _load_model(self.table.xml[version], self.physics)
        self.dt = self.model.opt.timestep * self.table.frame_skip
        self.spec = SpaceSpec(self.model.nq - 1 + self.model.nv, self.model.nu)
        self._mujoco = mujoco = _import_mujoco()
        self._data = [mujoco.MjData(self.model) for _ in range(num_envs)]
        self._scratch = mujoco.MjData(self.model)
        self.seed(seed)
        self.reset()
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Restarts the initial states' generators; call `reset` to draw from them."""
        self._generators = [
            np.random.Generator(
                np.random.PCG64(
                    np.random.SeedSequence(seed, spawn_key=(i,) if i else ())
                )
            )
            for i in range(self.num_envs)
        ]

    def reset(self, mask: np.ndarray | None = None) -> np.ndarray:
        """Starts new episodes where ``mask [env]`` is true (None: everywhere).

        Returns:
            The observations of all environments ``[env, obs]``, float64.
        """
        rows = range(self.num_envs) if mask is None else np.flatnonzero(mask)
        scale = self.table.reset_noise
        for i in rows:
            data, generator = self._data[i], self._generators[i]
            self._mujoco.mj_resetData(self.model, data)
            # The order of the draws is gymnasium's.
            data.qpos[:] += generator.uniform(-scale, scale, self.model.nq)
            if self.table.normal_velocity_noise:
                data.qvel[:] += scale * generator.standard_normal(self.model.nv)
            else:
                data.qvel[:] += generator.uniform(-scale, scale, self.model.nv)
            self._mujoco.mj_forward(self.model, data)
        return self.observation()

    def step(
        self, action: np.ndarray, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One control step in every environment, or where ``mask [env]`` is true.

        Args:
            action: ``[env, act]``; the motors clip to [-1, 1], the control cost does
                not.
            mask: environments left out keep their state; their results mean nothing.

        Returns:
            Next observation ``[env, obs]`` float64, reward ``[env]`` float64,
            terminated ``[env]``.

        Raises:
            ValueError: for actions of the wrong shape, or not finite (MuJoCo would
                reset itself without a word).
        """
        action = self._check_action(action, self.num_envs)
        before = np.array([data.qpos[0] for data in self._data])
        rows = range(self.num_envs) if mask is None else np.flatnonzero(mask)
        for i in rows:
            self._data[i].ctrl[:] = action[i]
            self._mujoco.mj_step(self.model, self._data[i], self.table.frame_skip)
        qpos, qvel = self.positions()
        return self._outcome(before, qpos, qvel, action)

    def observation(self) -> np.ndarray:
        """The current observations ``[env, obs]``, float64."""
        return self._observe(*self.positions())

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of all positions ``[env, nq]`` and velocities ``[env, nv]``."""
        qpos = np.array([data.qpos for data in self._data])
        return qpos, np.array([data.qvel for data in self._data])

    def oracle_step(
        self, qpos: np.ndarray, qvel: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What one control step does from any states; the batch itself is left alone.

        Args:
            qpos: ``[rows, nq]``, any number of rows.
            qvel: ``[rows, nv]``, unclipped (an observation does not hold them).
            action: ``[rows, act]``.

        Returns:
            Next observation, reward and terminated, as `step`.
        """
        action = self._check_action(action, len(qpos))
        next_qpos, next_qvel = np.empty_like(qpos), np.empty_like(qvel)
        data = self._scratch
        for i in range(len(qpos)):
            self._mujoco.mj_resetData(self.model, data)
            data.qpos[:], data.qvel[:], data.ctrl[:] = qpos[i], qvel[i], action[i]
            self._mujoco.mj_step(self.model, data, self.table.frame_skip)
            next_qpos[i], next_qvel[i] = data.qpos, data.qvel
        return self._outcome(qpos[:, 0], next_qpos, next_qvel, action)

    def get_state(self) -> BatchState:
        """A copy of the whole state, as arrays that a checkpoint can hold."""
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        size = self._mujoco.mj_stateSize(self.model, kind)
        simulator = np.empty((self.num_envs, size))
        for row, data in zip(simulator, self._data, strict=True):
            self._mujoco.mj_getState(self.model, data, row, kind)
        return BatchState(simulator, np.array([_pack(g) for g in self._generators]))

    def set_state(self, state: BatchState) -> None:
        """Continues from `get_state`, bit for bit.

        Raises:
            ValueError: if the state is of another number of environments or another
                model.
        """
        kind = self._mujoco.mjtState.mjSTATE_INTEGRATION
        expected = (self.num_envs, self._mujoco.mj_stateSize(self.model, kind))
        if state.simulator.shape != expected:
            raise ValueError(
                f"state has shape {state.simulator.shape}, {self.name} with "
                f"{self.num_envs} environments needs {expected}; restore it into the "
                "batch it was taken from"
            )
        for i, data in enumerate(self._data):
            row = np.ascontiguousarray(state.simulator[i], np.float64)
            self._mujoco.mj_setState(self.model, data, row, kind)
            _unpack(self._generators[i], state.generator[i])

    def _check_action(self, action: np.ndarray, rows: int) -> np.ndarray:
        action = np.asarray(action)
        if action.shape != (rows, self.spec.action_size):
            raise ValueError(
                f"actions have shape {action.shape}, {self.name} needs "
                f"{(rows, self.spec.action_size)}"
            )
        if not np.isfinite(action).all():
            raise ValueError(
                f"{np.sum(~np.isfinite(action))} action values are NaN or infinite; "
                "the policy has diverged"
            )
        return action

    def _observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        clip = self.table.velocity_clip
        return np.concatenate([qpos[:, 1:], np.clip(qvel, -clip, clip)], axis=1)

    def _outcome(
        self, before: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        healthy = np.ones(len(qpos), bool)
        if self.table.healthy is not None:
            healthy = self.table.healthy(qpos, qvel)
        alive = healthy if self.version == "v5" else np.ones(len(qpos), bool)
        reward = (qpos[:, 0] - before) / self.dt + self.table.alive_bonus * alive
        # In the action's own precision, as gymnasium does.
        reward = reward - self.table.control_cost * np.sum(np.square(action), axis=1)
        return self._observe(qpos, qvel), reward, ~healthy


def _import_mujoco() -> Any:
    # Any: the package's names come from a compiled module without types.
    try:
        return importlib.import_module("mujoco")
    except ImportError as error:
        raise ImportError("simulating needs mujoco; pip install mujoco") from error


def _load_model(xml: str, physics: Physics) -> Any:
    mujoco = _import_mujoco()
    package = importlib.util.find_spec("gymnasium")
    if package is None or package.origin is None:
        raise ImportError("simulating needs gymnasium's models; pip install gymnasium")
    for name, factor in dataclasses.asdict(physics).items():
        if not (math.isfinite(factor) and factor >= 0) or (
            name == "mass" and factor == 0
        ):
            raise ValueError(
                f"{name}={factor}; expected a finite factor above 0 (1 = stock)"
            )
    assets = pathlib.Path(package.origin).parent / "envs" / "mujoco" / "assets"
    model = mujoco.MjModel.from_xml_path(str(assets / xml))
    if physics != Physics():
        model.opt.gravity[:] *= physics.gravity
        model.geom_friction[:, 0] *= physics.friction
        model.body_mass[:] *= physics.mass
        model.body_inertia[:] *= physics.mass
        model.dof_damping[:] *= physics.damping
        model.actuator_gear[:, 0] *= physics.gear
        # Quantities that the compiler derived from the masses.
        mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


_MASK64 = (1 << 64) - 1


def _pack(generator: np.random.Generator) -> np.ndarray:
    """A PCG64 generator's state as six uint64."""
    state = generator.bit_generator.state
    words = [state["state"]["state"], state["state"]["inc"]]
    split = [half for word in words for half in (word >> 64, word & _MASK64)]
    return np.array([*split, state["has_uint32"], state["uinteger"]], np.uint64)


def _unpack(generator: np.random.Generator, packed: np.ndarray) -> None:
    high, low, inc_high, inc_low, has_uint32, uinteger = (int(word) for word in packed)
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": (high << 64) | low, "inc": (inc_high << 64) | inc_low},
        "has_uint32": has_uint32,
        "uinteger": uinteger,
    }
