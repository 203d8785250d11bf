"""The vocabulary of the library: arrays that travel together and functions that do.

A *factory* takes a frozen config and returns one of the NamedTuples of pure functions
below. None of them holds a key, a parameter or a file; state is whatever ``init``
returned. Argument order everywhere: ``params``, ``key``, ``state``, data, options.

Shapes: batch axes lead (``*batch``), a model axis comes first where there is one, time is
axis 0 of a rollout.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float
from jaxtyping import Key as KeyArray

Key: TypeAlias = KeyArray[Array, ""]
Params: TypeAlias = Any
"""A pytree of arrays."""
State: TypeAlias = Any
"""A pytree of arrays with a fixed structure."""
Metrics: TypeAlias = dict[str, jax.Array]
"""Scalars by name."""

EnergyFn: TypeAlias = Callable[[jax.Array], jax.Array]
"""``position [*batch, dim] -> energy [*batch]``; low is likely, row by row."""
PolicyFn: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""``(key, observation [*batch, obs]) -> action [*batch, act]``."""
TerminatedFn: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(observation, action, next_observation) -> terminated [*batch]``, in raw units."""
WeightFn: TypeAlias = Callable[..., jax.Array]
"""``(uncertainty [model, *batch], …) -> weights [model, *batch]``, summing to one."""


class SpaceSpec(NamedTuple):
    """Sizes of the spaces that a model or a policy works on (static)."""

    observation_size: int
    action_size: int


class Transition(NamedTuple):
    """One environment step, in raw units.

    ``terminated`` ends the return (nothing to bootstrap from); ``truncated`` only ends the
    recording, so that learners still bootstrap from ``next_observation``.
    """

    observation: Float[Array, "*batch obs"]
    action: Float[Array, "*batch act"]
    reward: Float[Array, "*batch"]
    next_observation: Float[Array, "*batch obs"]
    terminated: Bool[Array, "*batch"]
    truncated: Bool[Array, "*batch"]


class History(NamedTuple):
    """The last steps before a prediction, newest first: lag 0 is the current step.

    One-step models read lag 0 only. ``valid`` is true for a prefix of the lags.
    """

    observation: Float[Array, "lag *batch obs"]
    action: Float[Array, "lag *batch act"]
    valid: Bool[Array, "lag *batch"]


class Prediction(NamedTuple):
    """What a transition model says of the next step, in raw units."""

    next_observation: Float[Array, "*batch obs"]
    reward: Float[Array, "*batch"]
    uncertainty: Float[Array, "*batch"]
    energy: Float[Array, "*batch"]


class Network(NamedTuple):
    """``init(key, *example) -> params``, ``apply(params, *inputs) -> output``."""

    init: Callable[..., Params]
    apply: Callable[..., Any]


class Sampler(NamedTuple):
    """``init(position) -> state``, ``step(key, state) -> (state, info)``."""

    init: Callable[[Any], State]
    step: Callable[[jax.Array, State], tuple[State, Any]]


class Learner(NamedTuple):
    """``init(key, …) -> state``, ``update(key, state, batch) -> (state, metrics)``."""

    init: Callable[..., State]
    update: Callable[[jax.Array, State, Any], tuple[State, Metrics]]


@runtime_checkable
class ActFn(Protocol):
    """``act(params, key, observation, *, deterministic=False) -> action``."""

    def __call__(
        self,
        params: Params,
        key: jax.Array,
        observation: jax.Array,
        /,
        *,
        deterministic: bool = False,
    ) -> jax.Array: ...


class Policy(NamedTuple):
    """A learner that acts. Its state has a field ``params``; ``act`` takes those.

    ``energy(params, observation, action) -> energy [*batch]``, or None where a policy has
    none.
    """

    init: Callable[..., State]
    update: Callable[[jax.Array, State, Any], tuple[State, Metrics]]
    act: ActFn
    energy: Callable[..., jax.Array] | None


class TransitionModel(NamedTuple):
    """What consumers of a dynamics model see. All functions take params first.

    ``predict(params, key, history) -> Prediction``;
    ``energy(params, history, next_observation, reward) -> energy [*batch]``;
    ``uncertainty(params, history) -> uncertainty [*batch]``. ``expert`` is the energy that
    other models can be fused with, None where a model has none.
    """

    predict: Callable[[Params, jax.Array, History], Prediction]
    energy: Callable[..., jax.Array]
    uncertainty: Callable[[Params, History], jax.Array]
    expert: Any = None


class Dynamics(NamedTuple):
    """A learner of a transition model. Its state has a field ``params``."""

    init: Callable[..., State]
    update: Callable[[jax.Array, State, Any], tuple[State, Metrics]]
    model: TransitionModel


class Buffer(NamedTuple):
    """``init(example) -> state``, ``add(state, batch, *, valid=None) -> state``,
    ``sample(key, state) -> batch``; rows that are not ``valid`` are not stored."""

    init: Callable[[Any], State]
    add: Callable[..., State]
    sample: Callable[[jax.Array, State], Any]


class Environment(NamedTuple):
    """A jittable environment: ``reset(key) -> (state, observation)`` and
    ``step(key, state, action) -> (state, transition)``; batching is the caller's ``vmap``.

    ``transition`` holds the true next observation, before any auto-reset; the observation
    to act on next is ``observe(state)``.
    """

    reset: Callable[[jax.Array], tuple[State, jax.Array]]
    step: Callable[[jax.Array, State, jax.Array], tuple[State, Transition]]
    observe: Callable[[State], jax.Array]
    spec: SpaceSpec


class LanguageModel(NamedTuple):
    """Next-token laws over one vocabulary, with a cache. Functions take params first.

    ``init_cache(batch_size, length) -> cache`` has room for ``length`` columns. The others
    write the next columns and return the cache as it is after them:
    ``prefill(params, tokens [batch, time], valid [batch, time], cache, *,
    last_only=False) -> (logits [batch, time, vocab], cache)`` reads the prompt into an
    empty cache (``last_only`` keeps the last column's logits alone, ``time`` 1);
    ``extend(params, tokens, valid, cache) -> (logits, cache)`` reads on, teacher-forced;
    ``step(params, tokens [batch], cache) -> (logits [batch, vocab], cache)`` reads one.

    Logits in column ``t`` say what follows the tokens up to and with ``t``. Tokens that
    are not ``valid`` are padding, on either side: never attended to, and no position is
    counted for them.
    """

    init_cache: Callable[[int, int], State]
    prefill: Callable[..., tuple[jax.Array, State]]
    extend: Callable[..., tuple[jax.Array, State]]
    step: Callable[[Params, jax.Array, State], tuple[jax.Array, State]]
    vocab_size: int
    context_length: int
