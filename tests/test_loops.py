"""The loops: chunks are the whole, resuming is not stopping, one trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.base import Learner, Sampler
from emfuse_jax.loops import fit, run_sampler, scan_steps

NUM_STEPS, CHUNK = 12, 4


def noisy_step(key, state):
    return 0.9 * state + jax.random.normal(key, state.shape), state


def sum_sampler():
    """Adds standard normal numbers; the info is the last one."""

    def step(key, state):
        noise = jax.random.normal(key, state.shape)
        return state + noise, noise

    return Sampler(lambda position: position, step)


def traced_learner():
    """Least squares on noisy targets by momentum; counts how often it is traced."""
    traces = []

    def update(key, state, batch):
        traces.append(1)
        weights, momentum, step = state
        x, y = batch
        y = y + 0.1 * jax.random.normal(key, y.shape)

        def loss_fn(weights):
            return jnp.mean(jnp.square(x @ weights - y))

        loss, gradient = jax.value_and_grad(loss_fn)(weights)
        momentum = 0.5 * momentum + gradient
        state = (weights - 0.1 * momentum, momentum, step + 1)
        return state, {"loss": loss, "step": step}

    def init(key):
        return (jax.random.normal(key, (3,)), jnp.zeros(3), jnp.zeros((), jnp.int32))

    return Learner(init, update), traces


def sample_batch(key, data):
    rows = jax.random.randint(key, (8,), 0, len(data[0]))
    return data[0][rows], data[1][rows]


@pytest.fixture(scope="module")
def data():
    x = jax.random.normal(jax.random.key(9), (50, 3))
    return x, x @ jnp.array([1.0, -2.0, 3.0])


@pytest.fixture(scope="module")
def whole(data):
    learner, _ = traced_learner()
    state = learner.init(jax.random.key(0))
    return jax.jit(
        lambda key, state, data: fit(
            key, learner, state, sample_batch, NUM_STEPS, data=data, chunk=NUM_STEPS
        )
    )(jax.random.key(1), state, data)


def test_a_step_gets_the_key_of_its_number():
    key = jax.random.key(0)
    state, outputs = jax.jit(
        lambda key: scan_steps(key, noisy_step, jnp.zeros(2), 3, start=5)
    )(key)
    expected, seen = jnp.zeros(2), []
    for number in (5, 6, 7):
        expected, before = noisy_step(jax.random.fold_in(key, number), expected)
        seen.append(before)
    np.testing.assert_allclose(state, expected, rtol=1e-6)
    np.testing.assert_allclose(outputs, np.stack(seen), rtol=1e-6)


def test_two_scans_in_a_row_are_one_bitwise():
    key, scan = jax.random.key(1), jax.jit(scan_steps, static_argnums=(1, 3))
    all_at_once, outputs = scan(key, noisy_step, jnp.zeros(2), 20)
    half, first = scan(key, noisy_step, jnp.zeros(2), 12)
    resumed, second = scan(key, noisy_step, half, 8, start=12)
    np.testing.assert_array_equal(resumed, all_at_once)
    np.testing.assert_array_equal(np.concatenate([first, second]), outputs)
    # Without the start the numbers would repeat.
    repeated, _ = scan(key, noisy_step, half, 8)
    assert not np.allclose(repeated, all_at_once)


@pytest.mark.full_compile
def test_thinning_keeps_the_last_of_each_group():
    key, sampler, start = jax.random.key(2), sum_sampler(), jnp.zeros(4)

    def run(thin):
        return run_sampler(
            key, sampler, start, 6, keep=lambda state, info: (state, info), thin=thin
        )

    end, (states, infos) = run(1)
    assert states.shape == (6, 4)
    np.testing.assert_allclose(np.cumsum(infos, axis=0), states, rtol=1e-5)
    for thin in (2, 3):
        thinned_end, kept = run(thin)
        np.testing.assert_array_equal(thinned_end, end)
        np.testing.assert_array_equal(kept[0], states[thin - 1 :: thin])
    _, nothing = run_sampler(key, sampler, start, 6)
    assert nothing is None
    for thin in (0, 4):
        with pytest.raises(ValueError, match="does not divide num_steps=6"):
            run(thin)


def test_fit_in_chunks_is_the_whole_bitwise(data, whole):
    learner, traces = traced_learner()
    state = learner.init(jax.random.key(0))
    run = jax.jit(
        lambda key, state, data: fit(
            key, learner, state, sample_batch, NUM_STEPS, data=data, chunk=CHUNK
        )
    )
    chunked, metrics = run(jax.random.key(1), state, data)
    run(jax.random.key(2), state, data)
    jax.tree.map(np.testing.assert_array_equal, chunked, whole[0])
    # Means over each chunk.
    np.testing.assert_allclose(metrics["step"], [1.5, 5.5, 9.5])
    np.testing.assert_allclose(metrics["loss"].mean(), whole[1]["loss"][0], rtol=1e-5)
    assert len(traces) == 1


def test_the_host_path_is_the_pure_path_and_resumes(data, whole):
    learner, traces = traced_learner()
    seen, kept = [], {}

    def on_chunk(step, state, metrics):
        # On the host: a chunk is waited for before the next is sent to the devices.
        assert isinstance(metrics["step"], np.ndarray | np.generic)
        seen.append((step, float(metrics["step"])))
        kept[step] = jax.device_get(state)
        return step == stop_at

    def run(state, start=0):
        return fit(
            jax.random.key(1),
            learner,
            jax.tree.map(jnp.array, state),
            sample_batch,
            NUM_STEPS,
            data=data,
            chunk=CHUNK,
            start=start,
            on_chunk=on_chunk,
        )

    stop_at = None
    state, metrics = run(learner.init(jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, state, whole[0])
    assert seen == [(4, 1.5), (8, 5.5), (12, 9.5)]
    assert metrics["loss"].shape == (3,)
    assert len(traces) == 1

    # Stopped after two chunks and resumed.
    stop_at, seen = 8, []
    stopped, metrics = run(learner.init(jax.random.key(0)))
    assert [step for step, _ in seen] == [4, 8]
    assert metrics["loss"].shape == (2,)
    stop_at = None
    resumed, _ = run(stopped, start=8)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole[0])
    # The pure path resumes alike.
    pure, _ = jax.jit(
        lambda key, state, data: fit(
            key, learner, state, sample_batch, NUM_STEPS, data=data, chunk=4, start=8
        )
    )(jax.random.key(1), kept[8], data)
    jax.tree.map(np.testing.assert_array_equal, pure, whole[0])


def test_fit_over_seeds_is_a_loop_of_seeds(data):
    learner, traces = traced_learner()

    def run(key):
        key_init, key_fit = jax.random.split(key)
        return fit(
            key_fit,
            learner,
            learner.init(key_init),
            sample_batch,
            10,
            data=data,
            chunk=5,
        )

    def keys():  # fresh ones each time: a used key may not be used again
        return jax.random.split(jax.random.key(3), 3)

    together = jax.jit(jax.vmap(run))(keys())
    assert len(traces) == 1
    alone = jax.jit(run)
    for index in range(3):
        expected = alone(keys()[index])
        got = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected
        )
    assert not np.allclose(together[0][0][0], together[0][0][1])


def test_chunks_that_do_not_divide_are_refused(data):
    learner, _ = traced_learner()
    state = learner.init(jax.random.key(0))

    def run(num_steps, **options):
        return fit(
            jax.random.key(1), learner, state, sample_batch, num_steps, **options
        )

    with pytest.raises(ValueError, match="the nearest num_steps is 12"):
        run(10, chunk=4)
    with pytest.raises(ValueError, match="start=6"):
        run(12, chunk=4, start=6)
    # Fewer steps than a chunk are one chunk.
    _, metrics = run(2, chunk=1000, data=data)
    assert metrics["loss"].shape == (1,)
