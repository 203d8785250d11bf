"""Unadjusted and annealed Langevin against what theory says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _standard_errors
from emfuse_jax.loops import run_sampler, scan_steps
from emfuse_jax.samplers import annealed_langevin, ula

MATRIX = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]])
CENTER = np.array([1.0, -2.0, 0.5])


def _quadratic(position):
    """½ (y - c)ᵀ A (y - c)."""
    offset = position - jnp.broadcast_to(
        jnp.asarray(CENTER, position.dtype), position.shape
    )
    return 0.5 * jnp.sum(offset * (offset @ jnp.asarray(MATRIX, position.dtype)), -1)


def _unit(position):
    return 0.5 * jnp.sum(jnp.square(position), axis=-1)


def _positions(state, info):
    return state.position


def _run(key, sampler, position, num_steps, **options):
    return jax.jit(lambda k, y: run_sampler(k, sampler, y, num_steps, **options))(
        key, position
    )


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_ula_is_the_affine_recursion_with_the_same_noise(temperature):
    with jax.enable_x64(True):
        key, step_size, num_steps = jax.random.key(0), 0.2, 30
        start = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)) * 3)
        sampler = ula(_quadratic, step_size, temperature=temperature)
        _, kept = _run(key, sampler, start, num_steps, keep=_positions)
        position = np.asarray(start)
        for step in range(num_steps):
            noise = jax.random.normal(jax.random.fold_in(key, step), (4, 3))
            drift = (position - CENTER) @ MATRIX
            scale = np.sqrt(2 * step_size * temperature)
            position = position - step_size * drift + scale * np.asarray(noise)
            np.testing.assert_allclose(kept[step], position, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def stationary():
    """Positions of 20,000 independent chains on N(0, I), h = 0.5, 12 halvings on."""
    sampler = ula(_unit, 0.5)
    state, _ = _run(jax.random.key(1), sampler, jnp.ones((20_000, 1)), 12)
    return np.asarray(state.position[:, 0])


def test_ula_has_its_own_stationary_variance(stationary):
    expected = 1 / (1 - 0.5 / 2)
    std = np.sqrt(2) * expected  # of a squared Gaussian
    error = _standard_errors.assert_mean_close(stationary**2, expected, std=std)
    assert expected - 1 > 20 * error  # the unbiased value is told apart
    _standard_errors.assert_mean_close(stationary, 0.5**12, std=np.sqrt(expected))


def test_ula_temperature_scales_the_stationary_variance():
    sampler = ula(_unit, 0.5, temperature=0.25)
    state, _ = _run(jax.random.key(2), sampler, jnp.zeros((20_000, 1)), 12)
    expected = 0.25 / (1 - 0.5 / 2)
    squares = np.asarray(state.position[:, 0]) ** 2
    _standard_errors.assert_mean_close(squares, expected, std=np.sqrt(2) * expected)


def test_ula_has_weak_order_one():
    """The error of E[y²] grows as h; the exact process with the same noise is the
    control variate that makes the slope visible."""
    step_sizes, errors = [0.05, 0.1, 0.2], []

    @jax.jit
    def run(key, start, step_size):
        sampler, decay = ula(_unit, step_size), jnp.exp(-step_size)

        def step(key, pair):
            ours, _ = sampler.step(key, sampler.init(pair[0]))
            noise = jax.random.normal(key, start.shape)
            exact = decay * pair[1] + jnp.sqrt(1 - decay**2) * noise
            return (ours.position, exact), None

        return scan_steps(key, step, (start, start), 120)[0]

    start = jax.random.normal(jax.random.key(3), (4096, 4))
    for step_size in step_sizes:
        with jax.debug_key_reuse(False):  # the two processes share their noise
            ours, exact = run(jax.random.key(4), start, step_size)
        difference = np.asarray(ours**2 - exact**2).ravel()
        errors.append(difference.mean())
        assert difference.mean() > 8 * difference.std() / np.sqrt(difference.size)
    slope = np.polyfit(np.log(step_sizes), np.log(errors), 1)[0]
    # h/2 + h²/4 + …: the slope over this range is 1.06.
    assert 0.85 < slope < 1.25


def test_constant_schedules_are_ula_bit_for_bit():
    start = jax.random.normal(jax.random.key(0), (5, 3))
    annealed = annealed_langevin(
        _quadratic, lambda step: 0.1, lambda step: jnp.sqrt(0.2)
    )
    options = {"num_steps": 20, "keep": _positions}
    _, ours = _run(jax.random.key(1), annealed, start, **options)
    _, theirs = _run(jax.random.key(1), ula(_quadratic, 0.1), start, **options)
    np.testing.assert_array_equal(ours, theirs)


def test_annealed_applies_each_clip_in_its_place():
    """By hand: clip the gradient, then the step with its noise, then the position."""
    key, start = jax.random.key(0), jnp.array([[4.0, 0.3], [-9.0, 0.0]])
    step_key = jax.random.fold_in(key, 0)
    sampler = annealed_langevin(
        _unit,
        lambda step: 0.5 / (1 + step),
        lambda step: 0.2,
        drift_clip=2.0,
        step_clip=1.1,
        bounds=(jnp.array([-9.0, -0.1]), jnp.array([3.05, 9.0])),
    )
    state, info = jax.jit(sampler.step)(step_key, sampler.init(start))
    noise = 0.2 * np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (2, 2)))
    moves = np.array([[-1.0, -0.15], [1.0, 0.0]]) + noise
    expected = np.asarray(start) + np.clip(moves, -1.1, 1.1)
    boxed = np.clip(expected, [-9.0, -0.1], [3.05, 9.0])
    np.testing.assert_allclose(state.position, boxed, rtol=1e-6)
    np.testing.assert_array_equal(info.drift_clip_rate, [0.5, 0.5])
    np.testing.assert_allclose(
        info.step_clip_rate, np.mean(np.abs(moves) > 1.1, axis=-1)
    )
    np.testing.assert_allclose(info.bounds_rate, np.mean(boxed != expected, axis=-1))
    np.testing.assert_allclose(info.energy, [8.045, 40.5], rtol=1e-6)
    np.testing.assert_allclose(info.gradient_norm, np.linalg.norm(start, axis=-1))
    assert state.step == 1
    step_key = jax.random.fold_in(key, 0)
    still, _ = jax.jit(sampler.step)(step_key, state._replace(position=start))
    assert np.abs(still.position - state.position).max() > 0.1  # h follows the step


def test_descent_without_noise_ends_at_a_stationary_point():
    def rough(y):
        return jnp.sum(jnp.square(jnp.square(y) - 1) + 0.3 * jnp.sin(5 * y), axis=-1)

    sampler = annealed_langevin(
        rough, lambda step: 0.04 * 0.998**step, None, drift_clip=9.0
    )
    start = jax.random.normal(jax.random.key(0), (64, 2)) * 1.5
    options = {"num_steps": 600, "keep": lambda s, info: info.gradient_norm}
    _, norms = _run(jax.random.key(1), sampler, start, **options)
    assert norms[0].mean() > 1
    assert norms[-1].max() < 1e-3


def test_chunks_equal_the_whole_bit_for_bit():
    sampler = ula(_quadratic, 0.1)
    start = sampler.init(jnp.ones((4, 3)))

    def chunk(state, first, num_steps):
        return jax.jit(
            lambda k, s: scan_steps(k, sampler.step, s, num_steps, start=first)[0]
        )(jax.random.key(0), state)

    whole = chunk(start, 0, 20)
    parts = chunk(chunk(start, 0, 12), 12, 8)
    np.testing.assert_array_equal(whole.position, parts.position)
    assert whole.step == parts.step == 20


def test_vmap_loop_and_no_jit_agree():
    sampler = ula(_quadratic, 0.1)
    keys = jax.random.split(jax.random.key(0), 3)
    starts = jax.random.normal(jax.random.key(1), (3, 2, 3))

    def run(key, start):
        return run_sampler(key, sampler, start, 3)[0].position

    mapped = jax.jit(jax.vmap(run))(keys, starts)
    for row, (key, start) in enumerate(zip(keys, starts, strict=True)):
        np.testing.assert_allclose(mapped[row], jax.jit(run)(key, start), rtol=1e-5)
    state, key = sampler.init(starts[0]), jax.random.split(jax.random.key(0), 3)[0]
    for step in range(3):
        state, _ = sampler.step(jax.random.fold_in(key, step), state)
    np.testing.assert_allclose(mapped[0], state.position, rtol=1e-5)


def test_a_moving_box_may_be_traced():
    sampler_of = lambda low, high: ula(_unit, 0.1, bounds=(low, high))  # noqa: E731

    @jax.jit
    def run(key, center):
        sampler = sampler_of(center - 0.1, center + 0.1)
        return run_sampler(key, sampler, center, 10)[0].position

    center = jnp.array([[3.0, -3.0], [0.0, 5.0]])
    end = run(jax.random.key(0), center)
    assert (np.abs(end - center) <= 0.1 + 1e-6).all()
    assert (np.abs(end - center) > 0.09).any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ula(_unit, 0.0), "step_size=0.0; expected a positive"),
        (lambda: ula(_unit, 0.1, drift_clip=-1.0), "drift_clip=-1.0"),
        (lambda: ula(_unit, 0.1, bounds=(1.0, -1.0)), "low <= high"),
        (
            lambda: annealed_langevin(_unit, lambda i: 0.1, None, step_clip=0),
            "step_clip=0",
        ),
    ],
)
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.untyped
def test_an_energy_that_mixes_rows_is_refused():
    sampler = ula(lambda y: jnp.sum(jnp.square(y)), 0.1)
    with pytest.raises(ValueError, match="expected one energy per row"):
        sampler.step(jax.random.key(0), sampler.init(jnp.ones((4, 2))))


def test_float32_stays_float32():
    with jax.enable_x64(True):
        sampler = annealed_langevin(
            _unit,
            lambda step: 0.1 / (1 + step),
            lambda step: 0.1 / (1 + step),
            drift_clip=1.0,
            step_clip=1.0,
            bounds=(-1.0, 1.0),
        )
        start = jnp.ones((2, 2), jnp.float32)
        state, info = jax.eval_shape(
            sampler.step, jax.random.key(0), sampler.init(start)
        )
        assert state.position.dtype == jnp.float32
        assert {leaf.dtype for leaf in info} == {jnp.dtype("float32")}
