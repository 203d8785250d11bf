"""When an episode of a D4RL task ends, as functions of what a model predicts.

Each is ``(observation, action, next_observation) -> terminated [*batch]`` in raw units
and reads the next observation only. The bounds are gymnasium's health checks
(Hopper-v4, Walker2d-v4), rewritten for observations, which leave out the x position:
index 0 is the height and index 1 the angle of the torso.

Values of 100 or more in either direction, and values that are not finite, end every
episode. For Hopper this is part of the task; for the others it is not, and no real
state comes near it: it stops a model that has blown up. The check must take the
absolute value *before* it compares; taken after, it lets -500 through.
"""

import importlib
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from emfuse_jax.base import TerminatedFn

BLOW_UP = 100.0


def _outside(x: jax.Array) -> jax.Array:
    """Any value not finite or at least `BLOW_UP` in size (NaN compares false)."""
    return ~jnp.all(jnp.abs(x) < BLOW_UP, axis=-1)


def hopper_terminated(
    observation: Float[Array, "*batch obs"],
    action: Float[Array, "*batch act"],
    next_observation: Float[Array, "*batch obs"],
) -> Bool[Array, "*batch"]:
    """Fallen: height at most 0.7 or angle at least 0.2 rad; or a value of ±100 beyond
    it.

    Example:
        >>> upright = jnp.zeros(11).at[0].set(1.25)
        >>> bool(hopper_terminated(upright, jnp.zeros(3), upright))
        False
        >>> bool(hopper_terminated(upright, jnp.zeros(3), upright.at[7].set(-500.0)))
        True
    """
    del observation, action
    height, angle = next_observation[..., 0], next_observation[..., 1]
    healthy = jnp.isfinite(height) & (height > 0.7) & (jnp.abs(angle) < 0.2)
    return ~healthy | _outside(next_observation[..., 1:])


def walker2d_terminated(
    observation: Float[Array, "*batch obs"],
    action: Float[Array, "*batch act"],
    next_observation: Float[Array, "*batch obs"],
) -> Bool[Array, "*batch"]:
    """Fallen: height outside (0.8, 2.0) or angle at least 1 rad; or a blow-up.

    Example:
        >>> stands = jnp.zeros((1, 17)).at[:, 0].set(1.2)
        >>> leans = stands.at[:, 1].set(1.1)
        >>> [walker2d_terminated(stands, jnp.zeros((1, 6)), x).item() for x in (stands, leans)]
        [False, True]
    """
    del observation, action
    height, angle = next_observation[..., 0], next_observation[..., 1]
    healthy = (height > 0.8) & (height < 2.0) & (jnp.abs(angle) < 1.0)
    return ~healthy | _outside(next_observation)


def halfcheetah_terminated(
    observation: Float[Array, "*batch obs"],
    action: Float[Array, "*batch act"],
    next_observation: Float[Array, "*batch obs"],
) -> Bool[Array, "*batch"]:
    """Never in the real task; only on a blow-up.

    Example:
        >>> upside_down = jnp.full((1, 17), 3.0)
        >>> halfcheetah_terminated(upside_down, jnp.zeros((1, 6)), upside_down).tolist()
        [False]
    """
    del observation, action
    return _outside(next_observation)


TERMINATED_FNS: dict[str, TerminatedFn] = {
    "hopper": hopper_terminated,
    "walker2d": walker2d_terminated,
    "halfcheetah": halfcheetah_terminated,
}


def get_terminated_fn(name: str) -> TerminatedFn:
    """The termination function of a listed environment, or one that the user wrote.

    Args:
        name: a key of `TERMINATED_FNS`, or ``"module:function"`` for a function
            ``(observation, action, next_observation) -> terminated [*batch]`` in JAX.

    Raises:
        ValueError: if the name is neither, or the module or function cannot be loaded.

    Example:
        >>> get_terminated_fn("hopper").__name__
        'hopper_terminated'
        >>> get_terminated_fn("my_robot")
        Traceback (most recent call last):
            ...
        ValueError: no termination function for 'my_robot'; known: ...
    """
    if name in TERMINATED_FNS:
        return TERMINATED_FNS[name]
    known = ", ".join(TERMINATED_FNS)
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(
            f"no termination function for {name!r}; known: {known}. For another "
            "environment name your own as module:function, for instance "
            "my_task:terminated"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{name!r}: module {module_name!r} cannot be imported ({error}); run from "
            "the folder that holds it, or add that folder to PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(
            f"{name!r}: module {module_name!r} has no function {function_name!r}; it "
            "must take (observation, action, next_observation) and return terminated "
            "[*batch]"
        )
    return cast(TerminatedFn, function)
