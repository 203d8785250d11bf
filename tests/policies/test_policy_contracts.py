"""What every policy keeps to: any batch axes, one row, and refusals before tracing."""

import jax
import jax.numpy as jnp
import pytest

from emfuse_jax import loops, tree
from emfuse_jax.base import SpaceSpec, Transition
from emfuse_jax.nets.denoiser import DenoiserConfig
from emfuse_jax.nets.energy import conditional_energy
from emfuse_jax.policies._guidance import GuidanceConfig
from emfuse_jax.policies.aepo import AepoConfig, aepo
from emfuse_jax.policies.bc import BcConfig, bc
from emfuse_jax.policies.diffusion import DiffusionConfig, diffusion
from emfuse_jax.policies.diffusion_transformer import DiffusionTransformerConfig
from emfuse_jax.policies.ebt import EbtConfig, ebt_policy
from emfuse_jax.policies.ibc import ActionBox, IbcConfig, action_box, ibc
from emfuse_jax.policies.iql import IqlConfig, IqlCriticsConfig, iql
from emfuse_jax.policies.qgpo import QgpoConfig, qgpo
from emfuse_jax.policies.sac import SacConfig, sac

SPEC = SpaceSpec(3, 2)
SMALL = (4,)
BEHAVIOUR = DiffusionConfig(
    network=DenoiserConfig(kind="mlp", hidden_sizes=SMALL, time_features=2), num_steps=2
)
CRITICS = IqlCriticsConfig(hidden_sizes=SMALL)
GUIDANCE = GuidanceConfig(hidden_sizes=SMALL)
NAN = float("nan")

POLICIES = {
    "bc": lambda: bc(BcConfig(hidden_sizes=SMALL), SPEC),
    "sac": lambda: sac(SacConfig(hidden_sizes=SMALL), SPEC),
    "iql": lambda: iql(IqlConfig(critics=CRITICS, hidden_sizes=SMALL), SPEC),
    "diffusion": lambda: diffusion(BEHAVIOUR, SPEC),
    "aepo": lambda: aepo(
        AepoConfig(behaviour=BEHAVIOUR, critics=CRITICS, guidance=GUIDANCE), SPEC
    ),
    "qgpo": lambda: qgpo(
        QgpoConfig(
            behaviour=BEHAVIOUR,
            guidance=GUIDANCE,
            num_support=4,
            support_rows=1,
            support_steps=1,
            capacity=4,
            batch_size=2,
            hidden_sizes=SMALL,
        ),
        SPEC,
    ),
    "ebt": lambda: ebt_policy(EbtConfig(), SPEC, network=conditional_energy(SMALL)),
    "ibc": lambda: ibc(
        IbcConfig(hidden_sizes=SMALL, chain_steps=2, num_samples=4), SPEC
    ),
}


def rows_of(shape):
    nothing = jnp.zeros(shape)
    observation, action = (jnp.zeros((*shape, size)) for size in SPEC)
    done = jnp.zeros(shape, bool)
    return Transition(observation, action, nothing, observation, done, done)


@pytest.mark.parametrize("name", POLICIES)
def test_one_row_and_any_batch_axes_will_do(name):
    policy, key = POLICIES[name](), jax.random.key(0)
    state = jax.eval_shape(policy.init, key)
    new, metrics = jax.eval_shape(policy.update, key, state, rows_of((1,)))
    assert tree.same_structure(state, new)
    assert all(value.shape == () for value in metrics.values())
    for shape in ((), (1,), (2, 3)):
        observation = rows_of(shape).observation
        action = jax.eval_shape(policy.act, state.params, key, observation)
        assert action.shape == (*shape, SPEC.action_size)
        assert action.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"act\(key=None\)"):
        jax.eval_shape(lambda p: policy.act(p, None, observation), state.params)


@pytest.mark.parametrize("name", POLICIES)
def test_seeds_are_an_axis_and_a_run_of_any_length_is_one_trace(name):
    policy, traced = POLICIES[name](), []

    def update(key, state, batch):
        traced.append(1)
        return policy.update(key, state, batch)

    counted = policy._replace(update=update)

    def train(key):
        key_init, key_fit, key_act = jax.random.split(key, 3)
        state, metrics = loops.fit(
            key_fit,
            counted,
            policy.init(key_init),
            lambda k, _: rows_of((4,)),
            6,
            chunk=2,
        )
        return policy.act(state.params, key_act, rows_of((5,)).observation), metrics

    keys = jax.random.split(jax.random.key(0), 3)
    action, metrics = jax.eval_shape(jax.vmap(train), keys)
    assert action.shape == (3, 5, SPEC.action_size)
    assert all(value.shape == (3, 3) for value in metrics.values())  # [seed, chunk]
    assert len(traced) == 1


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (BcConfig, {"learning_rate": -1.0}),
        (IqlConfig, {"inverse_temperature": NAN}),
        (IqlConfig, {"decay_steps": 0}),
        (IqlCriticsConfig, {"learning_rate": 0.0}),
        (SacConfig, {"dispersion": NAN}),
        (SacConfig, {"fixed_temperature": NAN}),
        (SacConfig, {"target_entropy": NAN}),
        (SacConfig, {"actor_decay_steps": 0}),
        (SacConfig, {"critic_learning_rate": -1.0}),
        (DiffusionConfig, {"bound": -1.0}),
        (DiffusionConfig, {"bound": NAN}),
        (GuidanceConfig, {"learning_rate": -1.0}),
        (GuidanceConfig, {"scale": float("inf")}),
        (QgpoConfig, {"learning_rate": -1.0}),
        (EbtConfig, {"num_frames": 0}),
        (EbtConfig, {"horizon": 0}),
        (EbtConfig, {"warmup_steps": -1}),
        (EbtConfig, {"max_gradient_norm": 0.0}),
        (EbtConfig, {"noise": (0.2, NAN)}),
        (DiffusionTransformerConfig, {"num_frames": 0}),
        (IbcConfig, {"noise": -1.0}),
        (IbcConfig, {"step_clip": 0.0}),
        (IbcConfig, {"first_step": -0.1}),
        (IbcConfig, {"search_noise": -1.0}),
        (IbcConfig, {"decay": 0.0}),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(config, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        config(**options)


def test_a_box_that_holds_nothing_is_refused():
    init, one = POLICIES["ibc"]().init, jnp.ones(2)
    with pytest.raises(ValueError, match="low < high"):
        init(jax.random.key(0), box=ActionBox(one, -one))
    with pytest.raises(ValueError, match="one bound per dimension"):
        init(jax.random.key(0), box=ActionBox(-jnp.ones(3), jnp.ones(3)))
    with pytest.raises(ValueError, match=r"margin=-0.6"):
        action_box(jnp.array([[-0.5], [0.5]]), margin=-0.6)
