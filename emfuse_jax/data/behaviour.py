"""Behaviour policies as plain arrays: a file format, and a forward pass on the host.

A policy is an ``.npz`` of float32 arrays ``{layer}.weight`` ``[out, in]`` and
``{layer}.bias`` ``[out]`` for the layers ``fc0``, ``fc1``, ``last_fc`` and
``last_fc_log_std``: a tanh-Gaussian with two ReLU layers, which reads raw observations
and clips its log standard deviation to [-20, 2]. SAC snapshots of Fu et al.
("Benchmarks for Deep Off-Policy Evaluation", 2021, https://arxiv.org/abs/2103.16596)
have this form.

The package's own policies lie beside this file in ``behaviour/``.
"""

import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from emfuse_jax.base import SpaceSpec

LAYERS = ("fc0", "fc1", "last_fc", "last_fc_log_std")
LOG_STD_RANGE = (-20.0, 2.0)
MAX_BYTES = 2**28  # far more than any such policy
PACKAGED = pathlib.Path(__file__).parent / "behaviour"


class Linear(NamedTuple):
    """``x @ weight.T + bias``."""

    weight: Float[np.ndarray, "out in"]
    bias: Float[np.ndarray, "out"]


class Behaviour(NamedTuple):
    """The layers of a tanh-Gaussian policy."""

    fc0: Linear
    fc1: Linear
    last_fc: Linear
    last_fc_log_std: Linear

    @property
    def spec(self) -> SpaceSpec:
        """Sizes of the observations it reads and of its actions."""
        return SpaceSpec(self.fc0.weight.shape[1], self.last_fc.weight.shape[0])


def packaged_behaviours() -> list[str]:
    """Names that `load_behaviour` knows without a path.

    Example:
        >>> "hopper_medium" in packaged_behaviours()
        True
    """
    return sorted(path.stem for path in PACKAGED.glob("*.npz"))


def load_behaviour(source: str | pathlib.Path) -> Behaviour:
    """Reads a policy from a file, or a packaged one by its name.

    Raises:
        FileNotFoundError: if there is neither; lists the packaged ones.
        ValueError: if the file is no ``.npz``, lacks arrays, or their shapes do not
            fit.

    Example:
        >>> load_behaviour("hopper_medium").spec
        SpaceSpec(observation_size=11, action_size=3)
    """
    path = pathlib.Path(source)
    if str(source) in packaged_behaviours():
        path = PACKAGED / f"{source}.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"no behaviour policy {str(source)!r}: neither a file nor a packaged one "
            f"({', '.join(packaged_behaviours()) or 'none are packaged'})"
        )
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            # A member that is no array comes as bytes.
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable .npz of plain arrays ({error}); save one with "
            "save_behaviour"
        ) from error
    return _check(arrays, str(path))


def save_behaviour(path: str | pathlib.Path, policy: Behaviour) -> None:
    """Writes the layout that `load_behaviour` reads.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/mine.npz"
        >>> save_behaviour(path, load_behaviour("hopper_medium"))
        >>> load_behaviour(path).spec
        SpaceSpec(observation_size=11, action_size=3)
    """
    arrays: dict[str, Any] = {
        f"{name}.{part}": np.asarray(getattr(getattr(policy, name), part), np.float32)
        for name in LAYERS
        for part in Linear._fields
    }
    _check(arrays, str(path))
    np.savez_compressed(path, **arrays)


def behaviour_act(
    policy: Behaviour, *, noise: float = 1.0
) -> Callable[[jax.Array, np.ndarray], np.ndarray]:
    """``act(key, observation [rows, obs]) -> action [rows, act]``, float32 on the host.

    Args:
        policy: the layers.
        noise: factor on the standard deviation; 0 acts with the tanh of the mean.

    Example:
        >>> act = behaviour_act(load_behaviour("hopper_medium"), noise=0.0)
        >>> act(jax.random.key(0), np.zeros((2, 11), np.float32)).shape
        (2, 3)
    """
    weights = {
        name: np.ascontiguousarray(getattr(policy, name).weight.T) for name in LAYERS
    }

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[name] + getattr(policy, name).bias

    def act(key: jax.Array, observation: np.ndarray) -> np.ndarray:
        x = np.asarray(observation, np.float32)
        for name in ("fc0", "fc1"):
            x = np.maximum(linear(name, x), 0.0)
        position = linear("last_fc", x)
        if noise != 0.0:
            std = noise * np.exp(np.clip(linear("last_fc_log_std", x), *LOG_STD_RANGE))
            generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            position = position + std * generator.standard_normal(position.shape)
        return np.tanh(position).astype(np.float32)

    return act


def random_act(action_size: int) -> Callable[[jax.Array, np.ndarray], np.ndarray]:
    """Uniform actions in [-1, 1], with the signature of `behaviour_act`.

    Example:
        >>> random_act(3)(jax.random.key(0), np.zeros((2, 11), np.float32)).shape
        (2, 3)
    """

    def act(key: jax.Array, observation: np.ndarray) -> np.ndarray:
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return generator.uniform(-1, 1, (len(observation), action_size)).astype(
            np.float32
        )

    return act


def _check_size(path: pathlib.Path) -> None:
    """Zeros compress a thousandfold: what a file unpacks to is looked at first."""
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > MAX_BYTES:
        raise ValueError(
            f"it unpacks to {size} bytes; a policy has at most {MAX_BYTES}"
        )


def _check(arrays: Mapping[str, np.ndarray], source: str) -> Behaviour:
    names = [f"{layer}.{part}" for layer in LAYERS for part in Linear._fields]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ValueError(
            f"{source}: {', '.join(missing)} missing (present: {', '.join(arrays)}); a "
            f"policy needs {', '.join(names)}"
        )
    odd = [name for name in names if arrays[name].dtype.kind not in "fiu"]
    if odd:
        raise ValueError(
            f"{source}: {odd[0]} holds {arrays[odd[0]].dtype}; expected numbers"
        )
    for layer in LAYERS:
        weight, bias = arrays[f"{layer}.weight"], arrays[f"{layer}.bias"]
        previous = {"fc0": None, "fc1": "fc0"}.get(layer, "fc1")
        inputs = None if previous is None else len(arrays[f"{previous}.bias"])
        fits = weight.ndim == 2 and bias.shape == weight.shape[:1]
        if not fits or (inputs is not None and weight.shape[1] != inputs):
            raise ValueError(
                f"{source}: {layer}.weight has shape {weight.shape} and its bias "
                f"{bias.shape}; expected [out, {inputs or 'in'}] and [out]"
            )
    outputs = [arrays[f"{layer}.weight"].shape for layer in LAYERS[2:]]
    if outputs[0] != outputs[1]:
        raise ValueError(
            f"{source}: last_fc.weight has shape {outputs[0]}, last_fc_log_std.weight "
            f"{outputs[1]}; both must be [act, hidden]"
        )
    bad = [name for name in names if not np.isfinite(arrays[name]).all()]
    if bad:
        raise ValueError(f"{source}: {', '.join(bad)} hold NaN or infinity")
    layers = (
        Linear(
            *(arrays[f"{layer}.{part}"].astype(np.float32) for part in Linear._fields)
        )
        for layer in LAYERS
    )
    return Behaviour(*layers)
