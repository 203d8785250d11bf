"""Laws of soft actor-critic: targets by hand, gradients in closed form, known
optima."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import distributions, tree
from emfuse_jax.base import SpaceSpec, Transition
from emfuse_jax.loops import fit, scan_steps
from emfuse_jax.nets.critic import gaussian_actor, q_ensemble
from emfuse_jax.policies.sac import (
    SacConfig,
    SacState,
    actor_loss,
    critic_loss,
    critic_target,
    sac,
    temperature_loss,
)

SPEC = SpaceSpec(observation_size=3, action_size=2)
SMALL = SacConfig(hidden_sizes=(16, 16))


def make_batch(key, size=8, spec=SPEC):
    keys = jax.random.split(key, 4)
    return Transition(
        observation=jax.random.normal(keys[0], (size, spec.observation_size)),
        action=jnp.tanh(jax.random.normal(keys[1], (size, spec.action_size))),
        reward=jax.random.normal(keys[2], (size,)),
        next_observation=jax.random.normal(keys[3], (size, spec.observation_size)),
        terminated=jnp.arange(size) % 3 == 0,
        truncated=jnp.arange(size) % 3 == 1,
    )


@pytest.fixture(scope="module")
def policy():
    return sac(SMALL, SPEC)


@pytest.fixture(scope="module")
def update(policy):
    return jax.jit(policy.update)


@pytest.fixture(scope="module")
def state(policy):
    return jax.jit(policy.init)(jax.random.key(0))


def test_critic_target_on_a_two_state_chain_by_hand():
    # State 0 pays 1 and leads to state 1, where Q = (5, 4) and log π = −2;
    # state 1 pays 3 and ends. γ = 0.9, α = 0.5: 1 + 0.9 (4 + 0.5 · 2) = 5.5, and 3.
    target = critic_target(
        jnp.array([1.0, 3.0]),
        jnp.array([False, True]),
        jnp.array([[5.0, 7.0], [4.0, 8.0]]),
        jnp.array([-2.0, -2.0]),
        temperature=0.5,
        discount=0.9,
    )
    np.testing.assert_allclose(target, [5.5, 3.0], rtol=1e-6)


def test_a_terminal_state_with_an_infinite_value_stays_out_of_the_target():
    target = critic_target(
        jnp.ones(1),
        jnp.array([True]),
        jnp.full((2, 1), jnp.inf),
        jnp.zeros(1),
        temperature=1.0,
        discount=0.9,
    )
    np.testing.assert_array_equal(target, [1.0])


def test_critic_loss_sums_squares_and_stops_the_target_gradient():
    q, target = jnp.array([[1.0], [4.0]]), jnp.array([2.0])
    np.testing.assert_allclose(critic_loss(q, target), [1.0 + 4.0])
    gradient = jax.grad(lambda y: critic_loss(q, y).sum())(target)
    np.testing.assert_array_equal(gradient, [0.0])


def test_actor_gradient_is_the_reparameterised_one_on_a_quadratic_value():
    # a = m + s ε, Q = −(a − 1)², log π = −log s + const: the gradient of
    # α log π − Q with respect to m is 2 (a − 1), with respect to s it is −α/s + 2 (a −
    # 1) ε.
    mean, std, alpha = 0.3, 0.5, 0.2
    noise = jnp.array([-1.0, 0.2, 2.0])

    def loss(m, s):
        action = m + s * noise
        log_prob = -jnp.log(s) - 0.5 * noise**2
        return actor_loss(
            -jnp.square(action - 1.0)[None], log_prob, temperature=alpha
        ).sum()

    by_mean, by_std = jax.grad(loss, argnums=(0, 1))(mean, std)
    slope = 2.0 * (mean + std * noise - 1.0)
    np.testing.assert_allclose(by_mean, slope.sum(), rtol=1e-5)
    np.testing.assert_allclose(by_std, (-alpha / std + slope * noise).sum(), rtol=1e-5)


def test_actor_loss_gives_the_temperature_no_gradient():
    gradient = jax.grad(
        lambda a: actor_loss(jnp.zeros((2, 3)), jnp.ones(3), temperature=a).sum()
    )(0.5)
    assert gradient == 0.0


def test_temperature_is_at_rest_where_entropy_is_the_target():
    gradient = jax.grad(
        lambda x, entropy: temperature_loss(
            x, jnp.full(4, -entropy), target_entropy=-2.0
        ).mean()
    )
    at_rest, too_low, too_high = (
        gradient(jnp.float32(0.0), h) for h in (-2.0, -3.0, -1.0)
    )
    assert at_rest == 0.0
    # Descending: too little entropy raises the temperature, too much lowers it.
    assert too_low < 0.0 < too_high


def test_temperature_moves_towards_the_default_target(update, state):
    new, metrics = update(jax.random.key(1), state, make_batch(jax.random.key(2)))
    # Adam's first step has the sign of the gradient: −(log π + H) = entropy + |A|.
    assert np.sign(new.params.log_temperature) == -np.sign(metrics["entropy"] + 2.0)


def test_target_entropy_of_zero_is_not_the_default_and_tau_one_copies():
    config = SacConfig(hidden_sizes=(4,), target_entropy=0.0, target_update_rate=1.0)
    policy = sac(config, SPEC)
    # The batch's initial entropy is near 2 · (½ log 2πe) less the tanh's: between 0 and
    # −2 after a shift of the log standard deviation.
    state = jax.jit(policy.init)(jax.random.key(0))
    bias = state.params.actor["params"]["last_fc"]["bias"].at[2:].set(-1.5)
    state.params.actor["params"]["last_fc"]["bias"] = bias
    new, metrics = jax.jit(policy.update)(
        jax.random.key(1), state, make_batch(jax.random.key(2))
    )
    assert -2.0 < metrics["entropy"] < 0.0
    assert new.params.log_temperature > 0.0  # the default target would lower it
    chex.assert_trees_all_equal(new.target_critic, new.params.critic)


@pytest.mark.allow_key_reuse
def test_update_uses_termination_and_ignores_truncation(update, state):
    batch = make_batch(jax.random.key(2))
    key = jax.random.key(3)
    flip = {"truncated": ~batch.truncated}
    same, _ = update(key, state, batch._replace(**flip))
    base, metrics = update(key, state, batch)
    chex.assert_trees_all_equal(base, same)
    other, changed = update(key, state, batch._replace(terminated=~batch.terminated))
    assert changed["critic_loss"] != metrics["critic_loss"]
    bias = [
        s.optimizer_state.critic[0].mu["params"]["last_fc"]["bias"]
        for s in (base, other)
    ]
    assert not jnp.allclose(bias[0], bias[1])


@jax.jit
def critic_loss_by_parts(key, state, batch, temperature):
    """The update's critic loss, from the exported parts."""
    actor = gaussian_actor(SPEC.action_size, SMALL.hidden_sizes)
    critic = q_ensemble(2, SMALL.hidden_sizes)
    action, log_prob = distributions.sample_and_log_prob(
        jax.random.split(key)[0],
        *actor.apply(state.params.actor, batch.next_observation),
    )
    target = critic_target(
        batch.reward,
        batch.terminated,
        critic.apply(state.target_critic, batch.next_observation, action),
        log_prob,
        temperature=temperature,
        discount=0.99,
    )
    q = critic.apply(state.params.critic, batch.observation, batch.action)
    return critic_loss(q, target).mean()


@pytest.mark.allow_key_reuse
def test_update_equals_its_losses_one_by_one(update, state):
    batch, key = make_batch(jax.random.key(2)), jax.random.key(3)
    _, metrics = update(key, state, batch)
    expected = critic_loss_by_parts(key, state, batch, 1.0)
    np.testing.assert_allclose(metrics["critic_loss"], expected, rtol=1e-5)
    assert not np.allclose(expected, critic_loss_by_parts(key, state, batch, 0.0))


def test_target_critic_moves_by_tau(update, state):
    new, _ = update(jax.random.key(3), state, make_batch(jax.random.key(2)))
    expected = jax.tree.map(
        lambda old, now: 0.995 * old + 0.005 * now,
        state.target_critic,
        new.params.critic,
    )
    chex.assert_trees_all_close(new.target_critic, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.allow_key_reuse
def test_fixed_temperature_stays_and_backup_can_leave_the_entropy_out():
    config = SacConfig(
        hidden_sizes=SMALL.hidden_sizes, fixed_temperature=5.0, backup_entropy=False
    )
    policy = sac(config, SPEC)
    state = jax.jit(policy.init)(jax.random.key(0))
    batch, key = make_batch(jax.random.key(2)), jax.random.key(3)
    new, metrics = jax.jit(policy.update)(key, state, batch)
    np.testing.assert_allclose(jnp.exp(new.params.log_temperature), 5.0, rtol=1e-6)
    expected = critic_loss_by_parts(key, state, batch, 0.0)
    np.testing.assert_allclose(metrics["critic_loss"], expected, rtol=1e-5)
    assert not np.allclose(expected, critic_loss_by_parts(key, state, batch, 5.0))


def test_temperature_is_bounded_and_the_actor_rate_decays_to_zero():
    config = SacConfig(
        hidden_sizes=(4,),
        target_entropy=50.0,
        max_temperature=1.0,
        actor_decay_steps=2,
    )
    policy, batch = sac(config, SPEC), make_batch(jax.random.key(2))
    update = jax.jit(policy.update)
    states = [jax.jit(policy.init)(jax.random.key(0))]
    for step in range(3):
        states.append(update(jax.random.key(step), states[-1], batch)[0])
    # Unbounded, Adam would raise the log temperature by its rate at every step.
    assert [float(s.params.log_temperature) for s in states] == [0.0] * 4
    kernel = [s.params.actor["params"]["fc0"]["kernel"] for s in states]
    change = [float(jnp.abs(b - a).max()) for a, b in itertools.pairwise(kernel)]
    # Half a cosine: full rate, half, none.
    np.testing.assert_allclose(change[0], 3e-4, rtol=0.01)
    assert 0.0 < change[1] < 2e-4
    assert change[2] == 0.0


def test_chunks_of_a_scan_equal_the_whole_scan(policy, state):
    data = make_batch(jax.random.key(2), 64)

    def sample(key, arrays):
        index = jax.random.randint(key, (8,), 0, 64)
        return jax.tree.map(lambda leaf: leaf[index], arrays)

    def run(start_state, start):
        def step(key, carry):
            key_batch, key_update = jax.random.split(key)
            return policy.update(key_update, carry, sample(key_batch, data))

        return scan_steps(jax.random.key(5), step, start_state, 6, start=start)[0]

    chunk = jax.jit(run)
    halves = chunk(chunk(state, 0), 6)
    whole, _ = jax.jit(
        lambda s: fit(jax.random.key(5), policy, s, sample, 12, data=data, chunk=12)
    )(state)
    chex.assert_trees_all_equal(halves, whole)


def test_vmapped_seeds_equal_a_loop_of_seeds_and_trace_once(policy):
    data = make_batch(jax.random.key(2), 16)
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=2)  # once vmapped, once not
    def train(key):
        key_init, key_run = jax.random.split(key)
        state = policy.init(key_init)
        return fit(key_run, policy, state, lambda _, d: d, 10, data=data, chunk=10)

    keys = jax.random.split(jax.random.key(7), 3)
    vmapped = jax.jit(jax.vmap(train))(keys)[0]
    one = jax.jit(train)
    looped = tree.stack([one(key)[0] for key in keys])
    chex.assert_trees_all_close(vmapped.params, looped.params, rtol=1e-5, atol=1e-6)
    assert jnp.unique(vmapped.params.log_temperature).size > 1


def test_update_contract(policy, update, state):
    batch = make_batch(jax.random.key(2))
    before = jax.tree.map(np.array, state)
    new, metrics = update(jax.random.key(3), state, batch)
    assert isinstance(new, SacState)
    assert tree.same_structure(state, new)
    chex.assert_trees_all_equal(before, state)
    assert new.step == 1
    chex.assert_tree_all_finite((new, metrics))
    zeros = jax.tree.map(jnp.zeros_like, batch)
    chex.assert_tree_all_finite(update(jax.random.key(3), state, zeros))


def test_act_samples_or_takes_the_mode_and_energy_is_minus_log_prob(policy, state):
    observation = jax.random.normal(jax.random.key(1), (4, 3))
    act = jax.jit(policy.act, static_argnames="deterministic")
    mode = act(state.params, None, observation, deterministic=True)
    sample = act(state.params, jax.random.key(2), observation)
    assert mode.shape == sample.shape == (4, 2)
    assert jnp.all(jnp.abs(sample) <= 1.0)
    assert not jnp.allclose(mode, sample)
    with pytest.raises(ValueError, match="deterministic=True"):
        policy.act(state.params, None, observation)
    # The energy is normalised: exp(−E) integrates to one over the action square.
    grid = jnp.linspace(-1.0, 1.0, 801)[:-1] + 1.0 / 800
    actions = jnp.stack(jnp.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    rows = jnp.broadcast_to(observation[:1], (actions.shape[0], 3))
    density = jnp.exp(-jax.jit(policy.energy)(state.params, rows, actions))
    np.testing.assert_allclose(density.mean() * 4.0, 1.0, atol=5e-3)
    assert jnp.isfinite(policy.energy(state.params, observation[0], jnp.ones(2)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("discount", 1.5),
        ("target_update_rate", 0.0),
        ("fixed_temperature", -0.1),
        ("init_temperature", 0.0),
        ("max_temperature", -1.0),
    ],
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        SacConfig(**{field: value})
