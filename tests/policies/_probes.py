"""What learners on the probes of `envs.toy` share."""

import jax

from emfuse_jax.envs.base import auto_reset
from emfuse_jax.loops import scan_steps


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
