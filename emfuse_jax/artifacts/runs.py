"""Trained models from run directories alone.

``model.json`` says what was trained: its kind, its config and its spaces (of a fusion, its
members'). Dynamics keep their training state in ``checkpoints/``; what holds nothing but
parameters (fusions, policies, which would drag their model buffers along) says so.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emfuse_jax import dynamics
from emfuse_jax.artifacts.checkpoint import best_step, restore, steps
from emfuse_jax.artifacts.config import (
    from_json,
    nearest,
    read_json,
    unknown_name,
)
from emfuse_jax.artifacts.descriptions import (
    KINDS,
    MODEL_FILE,
    check_description,
    is_uniform,
)
from emfuse_jax.base import Dynamics, Params, Policy, SpaceSpec, TransitionModel
from emfuse_jax.data.normalizer import Normalizer
from emfuse_jax.tree import stack


class Trained(NamedTuple):
    """A model with its parameters; of ``model`` and ``policy`` one is None.

    ``learner`` is what trained it (None for a fusion), ``step`` the checkpoint's.
    """

    description: dict[str, Any]
    spec: SpaceSpec
    params: Params
    step: int
    model: TransitionModel | None = None
    policy: Policy | None = None
    learner: Dynamics | Policy | None = None


def build(description: dict[str, Any]) -> Any:
    """The learner (or, of a fusion, the `TransitionModel`) that a description names.

    Example:
        >>> from emfuse_jax.artifacts.descriptions import describe
        >>> from emfuse_jax.policies.bc import BcConfig
        >>> description = describe("bc", BcConfig(), SpaceSpec(observation_size=11, action_size=3))
        >>> callable(build(description).act)
        True
    """
    kind, spec = description["kind"], SpaceSpec(**description["spec"])
    if kind == "fused":
        return _build_fusion(description)
    if kind not in KINDS:
        raise ValueError(unknown_name("model", kind, KINDS))
    config = from_json(KINDS[kind].config, description["config"], where=kind)
    return KINDS[kind].build(config, spec)


def join_params(members: Sequence[dict[str, Any]], params: Sequence[Params]) -> Params:
    """The params of a fusion: a stack ``[model, …]`` of one architecture, or a tuple.

    Example:
        >>> from emfuse_jax.artifacts.descriptions import describe
        >>> member = describe("etm", dynamics.EtmConfig(), SpaceSpec(11, 3))
        >>> params = [{"w": jax.numpy.zeros(3)}, {"w": jax.numpy.ones(3)}]
        >>> join_params([member, member], params)["w"].shape  # [model, …]
        (2, 3)
    """
    return stack(params) if is_uniform(members) else tuple(params)


def load_run(path: str | os.PathLike[str], *, step: int | None = None) -> Trained:
    """Rebuilds a model and its best checkpoint (else its newest) from a run directory.

    Args:
        path: the run directory.
        step: another checkpoint than the best.

    Raises:
        FileNotFoundError: if it is no run directory or has no checkpoint yet.
        ValueError: if a file in it was not written by this package, or the checkpoint is
            of another architecture than ``model.json`` says.

    Example:
        >>> import tempfile
        >>> from emfuse_jax.artifacts import checkpoint
        >>> from emfuse_jax.artifacts.descriptions import describe, write_description
        >>> folder, spec, config = tempfile.mkdtemp(), SpaceSpec(2, 1), dynamics.EtmConfig()
        >>> write_description(folder, describe("etm", config, spec))
        >>> learner = dynamics.etm(config, spec)
        >>> template = scales_template(describe("etm", config, spec))
        >>> state = jax.eval_shape(learner.init, jax.random.key(0), template)
        >>> state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
        >>> checkpoint.save(f"{folder}/checkpoints", 10, state)  # as training does
        >>> load_run(folder).step
        10
    """
    path = pathlib.Path(path)
    if not (path / MODEL_FILE).exists():
        beside = [str(p.parent) for p in path.parent.glob(f"*/{MODEL_FILE}")]
        near = nearest(str(path), beside)
        raise FileNotFoundError(
            f"{path} has no {MODEL_FILE}; give the run directory of a trained model "
            "(what --run_dir named when it was trained)"
            + (f". Did you mean {near}?" if near else "")
        )
    description = read_json(path / MODEL_FILE)
    try:
        check_description(description)
    except ValueError as error:
        raise ValueError(f"{path / MODEL_FILE}: {error}") from error
    folder = path / (description["params_in"] or "checkpoints")
    if step is None:
        step = best_step(folder)
    if step is None:
        step = max(steps(folder), default=None)
    if step is None:
        raise FileNotFoundError(f"{path} has no checkpoint yet; rerun its command")
    built = build(description)
    params = _restore_params(description, built, folder, step)
    trained = Trained(description, SpaceSpec(**description["spec"]), params, step)
    if description["kind"] == "fused":
        return trained._replace(model=built)
    if isinstance(built, Policy):
        return trained._replace(policy=built, learner=built)
    return trained._replace(model=built.model, learner=built)


def _restore_params(
    description: dict[str, Any], built: Any, folder: pathlib.Path, step: int
) -> Params:
    if description["kind"] == "fused":
        return restore(folder, _fusion_template(description), step=step)
    template = _template(description, built)
    if description["num_seeds"] > 1:
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (description["num_seeds"], *leaf.shape), leaf.dtype
            ),
            template,
        )
    if description["params_in"]:
        return restore(folder, template.params, step=step)
    return restore(folder, template, step=step).params


def _template(description: dict[str, Any], learner: Any) -> Any:
    """Shapes of the learner's state, without computing one."""
    key = jax.random.key(0)
    if isinstance(learner, Policy):
        return jax.eval_shape(learner.init, key)
    return jax.eval_shape(learner.init, key, scales_template(description))


def _fusion_template(description: dict[str, Any]) -> Any:
    def params(member: dict[str, Any]) -> Any:
        return _template(member, build(member)).params

    members = description["members"]
    shapes = [params(member) for member in members]
    return jax.eval_shape(lambda trees: join_params(members, trees), shapes)


def scales_template(description: dict[str, Any]) -> dynamics.Scales:
    """Scales of the right shapes for a dynamics model's ``init``.

    Example:
        >>> from emfuse_jax.artifacts.descriptions import describe
        >>> description = describe("adetm", dynamics.AdetmConfig(num_lags=5), SpaceSpec(11, 3))
        >>> scales_template(description).target.mean.shape  # a row per slice: changes, reward
        (5, 12)
    """
    spec = SpaceSpec(**description["spec"])
    lags = description["config"].get("num_lags", 1)

    def ones(*shape: int) -> Normalizer:
        return Normalizer(jnp.zeros(shape), jnp.ones(shape))

    return dynamics.Scales(
        ones(spec.observation_size),
        ones(spec.action_size),
        ones(lags, spec.observation_size + 1),
    )


def _build_fusion(description: dict[str, Any]) -> TransitionModel:
    config = from_json(dynamics.FusionConfig, description["config"], where="fused")
    members = description["members"]
    models = [build(member).model for member in members]
    return dynamics.fuse_dynamics(
        models[0] if is_uniform(members) else models,
        config.weight_rule(),
        sampling=config.sampling,
    )
