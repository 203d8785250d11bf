"""Descent against closed forms: quadratics, step counts, stability, second derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax.loops import run_sampler
from emfuse_jax.samplers import annealed_langevin
from emfuse_jax.samplers.descent import descent, max_step_size, minimize

KEY = jax.random.key(0)


def bowl(position):
    return 0.5 * jnp.sum(jnp.square(position), axis=-1)


def positions(sampler, start, num_steps, key=KEY):
    """Of every step, ``[num_steps, *batch, dim]``, and what each step saw."""
    return run_sampler(
        key, sampler, start, num_steps, keep=lambda state, info: (state.position, info)
    )[1]


def test_gradient_descent_on_a_quadratic_is_the_closed_form():
    with jax.enable_x64():
        goal, curvature = jnp.array([[0.3, -0.7]]), jnp.array([[0.5, 2.0]])

        def energy_fn(y):
            return 0.5 * jnp.sum(curvature * jnp.square(y - goal), axis=-1)

        start = goal + jnp.array([[3.0, -1.0]])
        end, _ = positions(descent(energy_fn, 0.6), start, 7)
        error = (end[-1] - goal)[0]
        np.testing.assert_allclose(error, [0.2470629, 1.28e-5], rtol=1e-10)
        np.testing.assert_allclose(
            error, (1 - 0.6 * curvature[0]) ** 7 * (start - goal)[0], rtol=1e-10
        )
        # The Newton step of an isotropic bowl ends at once.
        one, _ = positions(descent(bowl, 1.0), start, 1)
        assert float(jnp.max(jnp.abs(one))) == 0.0


@functools.partial(jax.jit, static_argnames="max_steps")
def stopped(start, step_size, tolerance, momentum=0.0, max_steps=99):
    sampler = descent(bowl, step_size, momentum=momentum)
    return minimize(KEY, bowl, sampler, start, max_steps, tolerance=tolerance)


def test_every_row_takes_the_steps_that_it_needs():
    start = jnp.array([[0.01], [0.1], [1.0], [10.0]])
    end = stopped(start, 0.3, 1e-3)
    assert end.num_steps.tolist() == [7, 13, 20, 26]
    expected = np.ceil(np.log(1e-3 / start[:, 0]) / np.log(0.7))
    np.testing.assert_array_equal(end.num_steps, expected)
    np.testing.assert_allclose(
        end.position[:, 0], start[:, 0] * 0.7**expected, rtol=1e-4
    )
    np.testing.assert_allclose(end.gradient_norm, end.position[:, 0], rtol=1e-4)
    np.testing.assert_allclose(end.start_energy, bowl(start), rtol=1e-6)
    np.testing.assert_allclose(end.energy, bowl(end.position), rtol=1e-6)


def test_a_row_stops_by_its_own_gradient_and_not_by_its_neighbours():
    """A norm over the batch would let the far row keep the near one moving."""
    near = jnp.array([[0.01]] * 4)
    far = near.at[1:].set(1e4)
    alone, together = stopped(near, 0.3, 1e-3), stopped(far, 0.3, 1e-3)
    assert int(together.num_steps[0]) == int(alone.num_steps[0]) == 7
    np.testing.assert_array_equal(together.position[0], alone.position[0])
    assert (
        float(jnp.linalg.norm(far * 0.7**7)) > 1e-3
    )  # what the batch's norm would say


def test_seeds_descend_together_as_they_do_alone():
    """Under vmap one loop runs until the slowest seed has stopped; the others stay."""
    start = jnp.array([[[0.01], [1.0]], [[10.0], [0.1]]])

    def one(start):
        return minimize(KEY, bowl, descent(bowl, 0.3), start, 99, tolerance=1e-3)

    together, alone = jax.jit(jax.vmap(one))(start), jax.jit(one)
    assert together.num_steps.tolist() == [[7, 20], [26, 13]]
    for seed in range(2):
        end = alone(start[seed])
        for found, expected in zip(together, end, strict=True):
            np.testing.assert_allclose(found[seed], expected, rtol=1e-6)


def test_the_bound_on_steps_holds_and_no_tolerance_takes_them_all():
    start = jnp.array([[0.01], [0.1], [1.0], [10.0]])
    assert stopped(start, 0.3, 1e-3, max_steps=10).num_steps.tolist() == [7, 10, 10, 10]
    end = stopped(start, 0.3, 0.0, max_steps=10)
    fixed, _ = positions(descent(bowl, 0.3), start, 10)
    assert end.num_steps.tolist() == [10] * 4
    np.testing.assert_array_equal(end.position, fixed[-1])


def test_with_momentum_a_row_stops_where_its_gradient_is_small():
    """The gradient is taken ahead of the position, which may still be far from the rest."""
    start = jnp.array([[0.01], [0.1], [1.0], [10.0]])
    end = stopped(start, 0.3, 1e-3, momentum=0.9)
    assert (end.num_steps < 99).all()
    norm = np.abs(end.position[:, 0])  # the bowl's gradient is the position
    np.testing.assert_allclose(norm, end.gradient_norm, rtol=1e-5)
    assert (norm <= 1e-3).all()
    np.testing.assert_allclose(end.energy, bowl(end.position), rtol=1e-5)
    # Behind the point that was seen it is up to several times as large.
    trace, seen = positions(descent(bowl, 0.3, momentum=0.9), start, 99)
    before = np.concatenate([start[None], trace])
    behind = [abs(before[n, row, 0]) for row, n in enumerate(end.num_steps)]
    assert max(behind) > 5e-3
    ahead = [seen.position[n, row, 0] for row, n in enumerate(end.num_steps)]
    np.testing.assert_allclose(ahead, end.position[:, 0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"normalize": "sample"}, {"noise_schedule": lambda step: 2.0}]
)
def test_a_start_has_the_energy_of_where_it_was(options):
    """Not of where norm or noise have taken it before the first gradient."""
    start = jnp.array([[3.0, 4.0], [0.1, 0.0]])
    end = minimize(KEY, bowl, descent(bowl, 0.3, **options), start, 2)
    np.testing.assert_allclose(end.start_energy, [12.5, 0.005], rtol=1e-6)


@functools.partial(jax.jit, static_argnames="noisy_first")
def stationary(key, noisy_first):
    start = jnp.zeros((40_000, 1))
    if noisy_first:
        sampler = descent(bowl, 0.9, noise_schedule=lambda step: 0.1)
    else:
        sampler = annealed_langevin(bowl, lambda step: 0.9, lambda step: 0.1)
    return positions(sampler, start, 8, key)[0][-1, :, 0]


@pytest.mark.parametrize(
    ("noisy_first", "variance"), [(True, 1.01010e-4), (False, 1.01010e-2)]
)
def test_noise_before_and_after_the_step_have_their_own_variances(
    noisy_first, variance
):
    rho, eta = 0.1, 0.1
    numerator = rho**2 * eta**2 if noisy_first else eta**2
    np.testing.assert_allclose(variance, numerator / (1 - rho**2), rtol=1e-5)
    sample = np.asarray(stationary(jax.random.key(4), noisy_first), np.float64)
    standard_error = variance * np.sqrt(2 / len(sample))
    assert abs(np.mean(sample**2) - variance) < 4 * standard_error


def recursion(x, mu):
    return np.array([[1 - x, mu * (1 - x)], [-x, mu * (1 - x)]])


def test_momentum_follows_the_recursion_of_nesterov():
    """Also that the velocity is carried: without it the first two steps would agree."""
    x, mu = 0.4, 0.9
    trace = [np.array([1.0, 0.0])]
    for _ in range(6):
        trace.append(recursion(x, mu) @ trace[-1])
    moved, _ = positions(descent(bowl, x, momentum=mu), jnp.ones((1, 1)), 6)
    np.testing.assert_allclose(moved[:, 0, 0], np.stack(trace)[1:, 0], rtol=1e-5)
    plain, _ = positions(descent(bowl, x), jnp.ones((1, 1)), 6)
    assert abs(float(plain[1, 0, 0] - moved[1, 0, 0])) > 0.2
    np.testing.assert_allclose(np.linalg.det(recursion(x, mu)), mu * (1 - x))
    np.testing.assert_allclose(np.trace(recursion(x, mu)), (1 - x) * (1 + mu))


def test_the_largest_stable_step_is_where_the_recursion_turns():
    def radius(x):
        return np.abs(np.linalg.eigvals(recursion(x, 0.9))).max()

    np.testing.assert_allclose([radius(1.35), radius(1.36)], [0.985, 1.006], atol=1e-3)
    limit = float(max_step_size(1.0, 0.9))
    np.testing.assert_allclose(limit, 3.8 / 2.8, rtol=1e-6)
    np.testing.assert_allclose(radius(limit), 1.0, atol=1e-6)
    np.testing.assert_allclose(max_step_size(4.0), 0.5)
    start = jnp.ones((1, 1))
    inside = stopped(start, 0.99 * limit, 0.0, momentum=0.9, max_steps=400)
    outside = stopped(start, 1.01 * limit, 0.0, momentum=0.9, max_steps=400)
    assert float(inside.energy[0]) < float(inside.start_energy[0]) * 1e-3
    assert float(outside.energy[0]) > float(outside.start_energy[0]) * 1e3


def test_too_long_steps_are_reported_and_never_leave_the_finite_numbers():
    end = stopped(jnp.array([[1.0], [0.0]]), 9.0, 0.0, max_steps=200)
    assert bool(jnp.isfinite(end.position).all())
    assert int(end.num_steps[0]) < 200  # it stopped before the step into infinity
    assert (end.energy > end.start_energy).tolist() == [True, False]
    tame = stopped(jnp.array([[1.0], [0.0]]), 1.9, 0.0, max_steps=200)
    assert (tame.energy > tame.start_energy).tolist() == [False, False]


def test_steps_scaled_by_the_energy_converge_near_and_diverge_far():
    start = jnp.array([[0.5], [1.5], [-1.5], [1.9], [-3.0]])
    sampler = descent(bowl, 0.2, momentum=0.9, energy_scaled=True)
    end = minimize(KEY, bowl, sampler, start, 300)
    converged = np.abs(end.position[:, 0]) < 1e-2
    assert converged.tolist() == [True, True, True, False, False]


def quartic_losses(theta, num_steps, *, detach):
    def energy_fn(y):
        shift = y - theta[1]
        return jnp.sum(
            0.5 * jnp.exp(theta[0]) * jnp.square(shift) + 0.05 * shift**4, axis=-1
        )

    start = jnp.array([[2.0], [-1.5], [0.4]])
    end, _ = positions(descent(energy_fn, 0.3, detach=detach), start, num_steps)
    return jnp.mean(jnp.square(end[-1] - 0.9))


VALUES = {
    (1, False): (-0.2335698, -1.425831),
    (3, False): (0.0960612, -1.969065),
    (6, False): (0.0815806, -2.153290),
    (3, True): (0.0137, -0.8975),
    (6, True): (0.0113, -0.8854),
}


@pytest.mark.parametrize(("num_steps", "detach"), list(VALUES))
def test_derivatives_through_the_descent(num_steps, detach):
    """Through all steps (S2) they are those of central differences; detached (S1) not."""
    with jax.enable_x64():
        theta = jnp.array([0.3, -0.2])
        loss = jax.jit(
            functools.partial(quartic_losses, num_steps=num_steps, detach=detach)
        )
        gradient = jax.grad(loss)(theta)
        step = 1e-5 * jnp.eye(2)
        central = jnp.stack([(loss(theta + s) - loss(theta - s)) / 2e-5 for s in step])
    through = np.allclose(gradient, central, rtol=1e-6)
    assert through != detach
    # The former are known to seven digits, the latter to four.
    np.testing.assert_allclose(
        gradient, VALUES[num_steps, detach], atol=6e-5 if detach else 6e-7
    )


def test_energies_do_not_rise_below_the_inverse_curvature():
    def energy_fn(y):  # curvature at most 1 + 1.5
        return jnp.sum(0.5 * jnp.square(y) + 1.5 * jnp.cos(y), axis=-1)

    start = 3.0 * jax.random.normal(jax.random.key(1), (64, 3))
    _, info = positions(descent(energy_fn, 0.4), start, 20)
    assert float(jnp.max(jnp.diff(info.energy, axis=0))) < 1e-5
    _, wild = positions(descent(energy_fn, 3.0), start, 20)
    assert float(jnp.max(jnp.diff(wild.energy, axis=0))) > 0.1


@pytest.mark.parametrize("normalize", ["none", "sample", "batch"])
def test_only_the_norm_of_the_batch_lets_rows_meet(normalize):
    start = jax.random.normal(jax.random.key(2), (3, 4))
    sampler = descent(bowl, 0.1, normalize=normalize)
    moved, _ = positions(sampler, start, 2)
    other, _ = positions(sampler, start.at[1:].multiply(50.0), 2)
    coupled = not np.array_equal(moved[-1, 0], other[-1, 0])
    assert coupled == (normalize == "batch")
    if normalize == "sample":
        root = np.sqrt(np.mean(np.square(start), axis=-1, keepdims=True))
        np.testing.assert_allclose(moved[0], 0.9 * start / root, rtol=1e-5)


def test_a_step_leaves_its_state_alone_and_repeats_itself():
    sampler = descent(bowl, 0.3, momentum=0.9)
    state = sampler.step(KEY, sampler.init(jnp.ones((2, 3))))[0]
    before = jax.tree.map(np.array, state)
    first, second = sampler.step(KEY, state)[0], sampler.step(KEY, state)[0]
    for one, two in ((first, second), (state, before)):
        jax.tree.map(np.testing.assert_array_equal, one, two)
    assert (first.position != state.position).all()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: descent(bowl, -0.1), "step_size=-0.1"),
        (lambda: descent(bowl, 0.1, momentum=1.0), "momentum=1.0"),
        (lambda: stopped(jnp.ones((1, 1)), 0.1, 0.0, max_steps=0), "max_steps=0"),
        (
            lambda: minimize(
                KEY, bowl, descent(bowl, 0.1), jnp.ones((1, 1)), 1, tolerance=-1.0
            ),
            "tolerance=-1.0",
        ),
    ],
)
def test_bad_settings_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.untyped
def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="normalize='rows'"):
        descent(bowl, 0.1, normalize="rows")
