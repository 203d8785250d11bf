"""The only scans over time that the library owns.

A step's key is ``fold_in(key, step)`` with the absolute step, so a run cut into chunks, or
stopped and resumed at ``start``, draws the same numbers as an uninterrupted one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from emfuse_jax.base import Learner, Metrics, Sampler, State

StepFn = Callable[[jax.Array, State], tuple[State, Any]]


def scan_steps(
    key: jax.Array,
    step_fn: StepFn,
    state: State,
    num_steps: int,
    *,
    start: int | jax.Array = 0,
) -> tuple[State, Any]:
    """Runs ``step_fn(fold_in(key, step), state)`` for ``step`` in ``start … start+num_steps-1``.

    Args:
        key: the run's key; it is not consumed, each step folds its number in.
        step_fn: ``(key, state) -> (state, output)``.
        state: where to begin.
        num_steps: a static count.
        start: the first step's number.

    Returns:
        The last state and the outputs stacked over ``[time]``.

    Example:
        >>> def step(key, state):
        ...     return state + 1.0, state
        >>> state, outputs = scan_steps(jax.random.key(0), step, jnp.zeros(()), 3)
        >>> float(state), outputs.tolist()
        (3.0, [0.0, 1.0, 2.0])
    """

    def body(carry: State, step: jax.Array) -> tuple[State, Any]:
        return step_fn(jax.random.fold_in(key, step), carry)

    return jax.lax.scan(body, state, start + jnp.arange(num_steps))


def run_sampler(
    key: jax.Array,
    sampler: Sampler,
    position: Any,
    num_steps: int,
    *,
    keep: Callable[[State, Any], Any] | None = None,
    thin: int = 1,
) -> tuple[State, Any]:
    """Runs a chain, keeping what the caller asks for from every ``thin``-th step.

    Args:
        key: consumed.
        sampler: any `Sampler`.
        position: where the chain starts.
        num_steps: steps in all, a multiple of ``thin``.
        keep: ``(state, info) -> what to keep``; None keeps nothing.
        thin: keep one step of this many, the last of each group.

    Returns:
        The last sampler state, and what was kept stacked over ``[num_steps // thin]``.

    Raises:
        ValueError: if ``thin`` does not divide ``num_steps``.

    Example:
        >>> def walk(key, state):
        ...     return state + 1.0, None
        >>> sampler = Sampler(init=lambda position: position, step=walk)
        >>> state, kept = run_sampler(
        ...     jax.random.key(0), sampler, jnp.zeros(()), 6, keep=lambda s, info: s, thin=2
        ... )
        >>> float(state), kept.tolist()
        (6.0, [2.0, 4.0, 6.0])
    """
    if thin < 1 or num_steps % thin:
        raise ValueError(
            f"thin={thin} does not divide num_steps={num_steps}; choose a divisor"
        )

    def group(state: State, first: jax.Array) -> tuple[State, Any]:
        if thin > 1:  # an empty scan would still be traced and compiled
            state, _ = scan_steps(
                key,
                lambda k, s: (sampler.step(k, s)[0], None),
                state,
                thin - 1,
                start=first,
            )
        state, info = sampler.step(jax.random.fold_in(key, first + thin - 1), state)
        return state, None if keep is None else keep(state, info)

    return jax.lax.scan(group, sampler.init(position), jnp.arange(0, num_steps, thin))


def fit(
    key: jax.Array,
    learner: Learner | Any,
    state: State,
    sample_batch: Callable[[jax.Array, Any], Any],
    num_steps: int,
    *,
    data: Any = None,
    chunk: int = 1000,
    start: int = 0,
    on_chunk: Callable[[int, State, Metrics], Any] | None = None,
) -> tuple[State, Metrics]:
    """Trains a learner: ``num_steps`` updates in chunks, metrics averaged over each chunk.

    With ``on_chunk=None`` this is one pure nested scan: jit it, vmap it over seeds. With a
    callback it is a host loop over the same chunk, compiled once with the state donated
    (pass a copy if you keep yours), and the callback sees every chunk's end; it stops early
    when the callback returns True. This host path is the one place where the library jits.

    Args:
        key: the run's key; step ``i`` uses ``fold_in(key, i)`` whatever the chunk. Or
            one key per seed, ``[seed]``: then the state's leaves lead with that axis and
            the seeds train as one program, each as it would alone.
        learner: anything with ``update(key, state, batch) -> (state, metrics)``.
        state: the learner's state at step ``start``.
        sample_batch: ``(key, data) -> batch``.
        num_steps: the last step's number plus one; a resumed run passes the same.
        data: arrays that ``sample_batch`` draws from, an argument so that they do not
            become constants of the program.
        chunk: updates per compiled call.
        start: updates already done, a multiple of ``chunk``.
        on_chunk: ``(step, state, metrics) -> stop``.

    Returns:
        The last state, and metrics stacked over ``[chunks]``.

    Raises:
        ValueError: if ``chunk`` does not divide ``num_steps`` and ``start``.

    Example:
        >>> def update(key, state, batch):
        ...     return state + batch, {"state": state}
        >>> learner = Learner(init=lambda key: jnp.zeros(()), update=update)
        >>> key = jax.random.key(0)
        >>> state, metrics = fit(
        ...     key, learner, learner.init(key), lambda key, data: data, 4, data=1.0, chunk=2
        ... )
        >>> float(state), metrics["state"].tolist()
        (4.0, [0.5, 2.5])
    """
    chunk = min(chunk, max(num_steps, 1))
    if num_steps % chunk or start % chunk:
        raise ValueError(
            f"chunk={chunk} must divide num_steps={num_steps} and start={start}; "
            f"the nearest num_steps is {-(-num_steps // chunk) * chunk}"
        )

    def step(step_key: jax.Array, carry: State, arrays: Any) -> tuple[State, Metrics]:
        key_batch, key_update = jax.random.split(step_key)
        return learner.update(key_update, carry, sample_batch(key_batch, arrays))

    def run_chunk(
        run_key: jax.Array, carry: State, first: jax.Array, arrays: Any
    ) -> tuple[State, Metrics]:
        carry, metrics = scan_steps(
            run_key, lambda k, s: step(k, s, arrays), carry, chunk, start=first
        )
        return carry, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

    if key.ndim:
        run_chunk = jax.vmap(run_chunk, in_axes=(0, 0, None, None))
    if on_chunk is None:
        firsts = jnp.arange(start, num_steps, chunk)
        return jax.lax.scan(
            lambda carry, first: run_chunk(key, carry, first, data), state, firsts
        )
    return _fit_on_host(
        key,
        jax.jit(run_chunk, donate_argnums=1),
        state,
        range(start, num_steps, chunk),
        chunk,
        data,
        on_chunk,
    )


def _fit_on_host(
    key: jax.Array,
    run_chunk: Callable[..., Any],
    state: State,
    firsts: range,
    chunk: int,
    data: Any,
    on_chunk: Any,
) -> tuple[State, Metrics]:
    history = []
    for first in firsts:
        state, metrics = run_chunk(key, state, jnp.asarray(first), data)
        metrics = jax.device_get(metrics)
        history.append(metrics)
        if on_chunk(first + chunk, state, metrics):
            break
    return state, jax.tree.map(
        lambda *rows: jnp.stack(rows), *history
    ) if history else {}
