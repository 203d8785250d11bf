"""What learners on the probes of `envs.toy` share."""

import jax

from emfuse_jax import tree
from emfuse_jax.envs import toy
from emfuse_jax.envs.base import auto_reset
from emfuse_jax.loops import fit, scan_steps


def random_transitions(key, env, num_steps=512):
    """Uniform random actions, restarting after two steps at the latest."""
    envs = auto_reset(env, max_steps=2)
    key_reset, key_run = jax.random.split(key)
    state, _ = envs.reset(key_reset)

    def step(step_key, carry):
        key_action, key_step = jax.random.split(step_key)
        action = jax.random.uniform(key_action, (1,), minval=-1.0, maxval=1.0)
        return envs.step(key_step, carry, action)

    return scan_steps(key_run, step, state, num_steps)[1]


def train_on_probes(policy, names, num_steps=1000):
    """One program trains a state per probe on its random transitions.

    Returns:
        The states by the probes' names, and the transitions stacked in their order.
    """
    draw = jax.jit(random_transitions, static_argnums=1)
    data = tree.stack(
        [draw(jax.random.key(i), getattr(toy, n)()) for i, n in enumerate(names)]
    )

    def sample(key, arrays):
        index = jax.random.randint(key, (64,), 0, arrays.reward.shape[0])
        return jax.tree.map(lambda leaf: leaf[index], arrays)

    def train(key, arrays):
        key_init, key_run = jax.random.split(key)
        state = policy.init(key_init)
        return fit(key_run, policy, state, sample, num_steps, data=arrays)[0]

    keys = jax.random.split(jax.random.key(0), len(names))
    states = tree.unstack(jax.jit(jax.vmap(train))(keys, data))
    return dict(zip(names, states, strict=True)), data
