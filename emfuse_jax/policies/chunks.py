"""Action chunks: policies that read some frames, plan some actions and execute a few.

A chunk policy is an ordinary policy of the spec that `chunk_spec` gives: its observation is
``num_frames`` frames, oldest first, flattened, and its action ``horizon`` actions from the
current step on, flattened. It plans, executes ``execute`` of them, and plans again
(receding horizon). Before an episode is ``num_frames`` old its first frame is repeated.

Reference:
    Chi et al., "Diffusion Policy", RSS 2023, section IV-C.
    https://arxiv.org/abs/2303.04137. There chunks begin with the oldest frame's action and
    the first ``num_frames - 1`` of them are never executed; here they are not predicted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from emfuse_jax.base import ActFn, Environment, Params, SpaceSpec, State, Transition
from emfuse_jax.data.dataset import Dataset, gather_history
from emfuse_jax.tree import select

__all__ = [
    "ChunkConfig",
    "ChunkState",
    "RecedingHorizon",
    "chunk_environment",
    "chunk_spec",
    "flat_frames",
    "gather_chunks",
    "push_frame",
    "receding_horizon",
    "start_frames",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """Settings of chunks.

    Attributes:
        num_frames: observations that a plan reads, the current one and those before it.
        horizon: actions of a plan.
        execute: how many of them are executed before the next plan.
    """

    num_frames: int = 2
    horizon: int = 16
    execute: int = 8

    def __post_init__(self) -> None:
        if self.num_frames < 1 or not 1 <= self.execute <= self.horizon:
            raise ValueError(
                f"num_frames={self.num_frames} must be at least 1, and execute="
                f"{self.execute} between 1 and horizon={self.horizon}"
            )


def chunk_spec(config: ChunkConfig, spec: SpaceSpec) -> SpaceSpec:
    """The spec of a policy of chunks, given the environment's.

    Example:
        >>> chunk_spec(ChunkConfig(), SpaceSpec(11, 3))
        SpaceSpec(observation_size=22, action_size=48)
    """
    return SpaceSpec(
        config.num_frames * spec.observation_size, config.horizon * spec.action_size
    )


def gather_chunks(
    dataset: Dataset, index: Int[ArrayLike, "*batch"], config: ChunkConfig
) -> Transition:
    """Frames up to rows ``index`` and actions from them on, never across an episode.

    Past an episode's end its last action is repeated. The rest of the transition is that
    of the row itself, one step, with frames for its observations. Pure JAX: pass the data
    set's arrays as arguments of the jitted function, or they become its constants.

    Args:
        dataset: arrays of all rows.
        index: rows of the current step.
        config: how many frames and actions.

    Returns:
        Observations ``[*batch, num_frames * obs]``, actions ``[*batch, horizon * act]``.

    Example:
        >>> from emfuse_jax.data import linear_gaussian
        >>> dataset, _ = linear_gaussian(num_episodes=2, length=20, action_size=2)
        >>> config = ChunkConfig(num_frames=2, horizon=8, execute=4)
        >>> rows = jax.eval_shape(
        ...     lambda data, index: gather_chunks(data, index, config), dataset, jnp.arange(5)
        ... )
        >>> rows.observation.shape, rows.action.shape
        ((5, 6), (5, 16))
    """
    index = jnp.asarray(index)
    history = gather_history(dataset, index, config.num_frames)
    frames = jnp.moveaxis(history.observation[::-1], 0, -2)
    following = jnp.asarray(dataset.next_observation)[index]
    ages, last_row = jnp.asarray(dataset.age), len(dataset.age) - 1
    age = ages[index][..., None]
    step = jnp.arange(config.horizon, dtype=age.dtype)
    step = step.reshape((1,) * index.ndim + step.shape)
    rows = jnp.minimum(index[..., None] + step, last_row)
    # Ages count up by one inside an episode and start again in the next one.
    inside = jnp.sum(ages[rows] == age + step, axis=-1, keepdims=True, dtype=age.dtype)
    rows = index[..., None] + jnp.minimum(step, inside - 1)
    chunk = jnp.asarray(dataset.action)[rows]
    return Transition(
        observation=flat_frames(frames),
        action=flat_frames(chunk),
        reward=jnp.asarray(dataset.reward)[index],
        next_observation=flat_frames(push_frame(frames, following)),
        terminated=jnp.asarray(dataset.terminated)[index],
        truncated=jnp.asarray(dataset.truncated)[index],
    )


def start_frames(
    observation: Float[Array, "*batch obs"], num_frames: int
) -> Float[Array, "*batch frame obs"]:
    """The frames at an episode's start: the first one, repeated.

    Example:
        >>> start_frames(jnp.array([3.0]), 2).tolist()
        [[3.0], [3.0]]
    """
    return jnp.repeat(observation[..., None, :], num_frames, axis=-2)


def push_frame(
    frames: Float[Array, "*batch frame obs"], observation: Float[Array, "*batch obs"]
) -> Float[Array, "*batch frame obs"]:
    """The frames one step later.

    Example:
        >>> push_frame(jnp.array([[1.0], [2.0]]), jnp.array([3.0])).tolist()
        [[2.0], [3.0]]
    """
    return jnp.concatenate([frames[..., 1:, :], observation[..., None, :]], axis=-2)


def flat_frames(
    frames: Float[Array, "*batch time dim"],
) -> Float[Array, "*batch flat"]:
    """What a policy reads: oldest first, in one row.

    Example:
        >>> flat_frames(jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [1.0, 2.0, 3.0, 4.0]
    """
    return frames.reshape(*frames.shape[:-2], -1)


class ChunkState(NamedTuple):
    """What acting remembers; ``used`` counts the executed actions of a row's plan.

    ``started`` is false until the row has seen its episode's first observation.
    """

    frames: Float[Array, "*batch frame obs"]
    plan: Float[Array, "*batch horizon act"]
    used: Int[Array, "*batch"]
    started: Array


class RecedingHorizon(NamedTuple):
    """Acting with chunks, as pure functions.

    ``init(batch_shape=()) -> ChunkState``;
    ``act(params, key, state, observation [*batch, obs], *, deterministic=False) ->
    (state, action [*batch, act])``;
    ``reset(state, done [*batch]) -> state`` forgets frames and plan of rows whose episode
    ended (or whose plan no longer fits, say after a push).
    """

    init: Callable[..., ChunkState]
    act: Callable[..., tuple[ChunkState, jax.Array]]
    reset: Callable[[ChunkState, jax.Array], ChunkState]


def receding_horizon(
    act_fn: ActFn, config: ChunkConfig, spec: SpaceSpec
) -> RecedingHorizon:
    """Executes a chunk policy step by step.

    A plan is made only in those steps where some row of the batch needs one (under
    ``vmap`` in every step: batch by leading axes instead).

    Args:
        act_fn: the chunk policy's ``act``.
        config: see `ChunkConfig`.
        spec: of the environment, one frame and one action.

    Example:
        >>> def act_fn(params, key, observation, *, deterministic=False):
        ...     return jnp.stack([observation[..., 1], observation[..., 1] + 1], -1)
        >>> config = ChunkConfig(num_frames=2, horizon=2, execute=2)
        >>> horizon = receding_horizon(act_fn, config, SpaceSpec(1, 1))
        >>> state, actions = horizon.init(), []
        >>> for time in range(4):
        ...     observation = jnp.array([10.0 * time])
        ...     state, action = horizon.act(None, jax.random.key(0), state, observation)
        ...     actions.append(float(action[0]))
        >>> actions
        [0.0, 1.0, 20.0, 21.0]
    """

    def init(batch_shape: tuple[int, ...] = ()) -> ChunkState:
        return ChunkState(
            jnp.zeros((*batch_shape, config.num_frames, spec.observation_size)),
            jnp.zeros((*batch_shape, config.horizon, spec.action_size)),
            jnp.full(batch_shape, config.execute, jnp.int32),
            jnp.zeros(batch_shape, bool),
        )

    def reset(state: ChunkState, done: jax.Array) -> ChunkState:
        return state._replace(
            used=jnp.where(done, config.execute, state.used),
            started=state.started & ~done,
        )

    def act(
        params: Params,
        key: jax.Array,
        state: ChunkState,
        observation: jax.Array,
        *,
        deterministic: bool = False,
    ) -> tuple[ChunkState, jax.Array]:
        frames = select(
            state.started,
            push_frame(state.frames, observation),
            start_frames(observation, config.num_frames),
        )
        due = state.used >= config.execute

        def renew(plan: jax.Array) -> jax.Array:
            flat = act_fn(params, key, flat_frames(frames), deterministic=deterministic)
            return select(due, flat.reshape(plan.shape), plan)

        plan = jax.lax.cond(jnp.any(due), renew, lambda plan: plan, state.plan)
        used = jnp.where(due, 0, state.used)
        action = jnp.take_along_axis(plan, used[..., None, None], axis=-2)[..., 0, :]
        return ChunkState(frames, plan, used + 1, jnp.ones_like(due)), action

    return RecedingHorizon(init, act, reset)


class _ChunkEnvironmentState(NamedTuple):
    inner: State
    frames: Float[Array, "frame obs"]


def chunk_environment(environment: Environment, config: ChunkConfig) -> Environment:
    """The environment as a chunk policy sees it: one step executes ``config.execute``
    actions of a chunk.

    Rewards are summed until the episode ends, the rest of the chunk is dropped then, and
    frames start anew with what the environment observes after its end. With it every
    policy, evaluation and rollout of `Environment` serves chunks unchanged.

    Args:
        environment: of single steps.
        config: see `ChunkConfig`.

    Example:
        >>> from emfuse_jax.envs.toy import point_mass
        >>> env = chunk_environment(point_mass(), ChunkConfig(num_frames=2, horizon=16))
        >>> env.spec  # two frames of two numbers; sixteen actions of one
        SpaceSpec(observation_size=4, action_size=16)
    """
    num_frames = config.num_frames

    def reset(key: jax.Array) -> tuple[State, jax.Array]:
        inner, observation = environment.reset(key)
        frames = start_frames(observation, num_frames)
        return _ChunkEnvironmentState(inner, frames), flat_frames(frames)

    def step(
        key: jax.Array, state: _ChunkEnvironmentState, action: jax.Array
    ) -> tuple[State, Transition]:
        plan = action.reshape(config.horizon, environment.spec.action_size)
        nothing = (jnp.zeros(()), jnp.zeros((), bool), jnp.zeros((), bool))

        def body(carry: Any, item: Any) -> tuple[Any, None]:
            inner, frames, reward, terminated, truncated = carry
            number, move = item
            moved, one = environment.step(jax.random.fold_in(key, number), inner, move)
            live = ~(terminated | truncated)
            carry = (
                select(live, moved, inner),
                jnp.where(live, push_frame(frames, one.next_observation), frames),
                reward + jnp.where(live, one.reward, 0.0),
                terminated | (live & one.terminated),
                truncated | (live & one.truncated),
            )
            return carry, None

        steps = jnp.arange(config.execute), plan[: config.execute]
        carry, _ = jax.lax.scan(body, (*state, *nothing), steps)
        inner, frames, reward, terminated, truncated = carry
        transition = Transition(
            observation=flat_frames(state.frames),
            action=action,
            reward=reward,
            next_observation=flat_frames(frames),
            terminated=terminated,
            truncated=truncated,
        )
        first = start_frames(environment.observe(inner), num_frames)
        frames = jnp.where(terminated | truncated, first, frames)
        return _ChunkEnvironmentState(inner, frames), transition

    def observe(state: _ChunkEnvironmentState) -> jax.Array:
        return flat_frames(state.frames)

    return Environment(reset, step, observe, chunk_spec(config, environment.spec))
