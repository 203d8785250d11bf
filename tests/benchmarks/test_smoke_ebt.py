"""The pieces of the energy policy's benchmark: what it trains, scores and steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import _ebt_tasks
from benchmarks import ebt as benchmark
from benchmarks._ebt_figure import draw, landscape

CONFIG = benchmark.EbtBenchmarkConfig(**benchmark.SMOKE)


def test_the_published_recipe_is_that_of_the_paper():
    recipe = benchmark.published(CONFIG, 100)
    assert (recipe.train_steps, recipe.extra_steps, recipe.momentum) == (6, 4, 0.9)
    assert (recipe.noise, recipe.step_size_spread) == ((0.2, 0.002), 1.5)
    assert (recipe.detach, recipe.truncate, recipe.start_noise) == (True, False, (1, 1))


def test_tasks_are_the_laws_that_they_say():
    batch = _ebt_tasks.two_modes(jax.random.key(0), 4000)
    side = batch.action - 0.5 * jnp.sin(3 * batch.observation)
    np.testing.assert_allclose(np.abs(side), _ebt_tasks.MODE, rtol=1e-5)
    assert abs(float(jnp.mean(side > 0)) - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_ranks_are_counted_as_the_definition_says():
    low, high = jnp.array([1.0, 2.0, 5.0]), jnp.array([2.0, 3.0])
    # 1 is below both, 2 below one (a tie does not count), 5 below none.
    assert _ebt_tasks.auc(low, high) == pytest.approx(3 / 6)


def test_energies_are_drawn_with_the_actions_over_them(tmp_path):
    def energy(params, observation, action):
        return params + jnp.square(action - observation)[..., 0] + observation[..., 0]

    values = landscape(energy, 3.0)
    assert np.argmin(values, axis=0).tolist() == list(range(len(values)))
    assert np.all(values.min(axis=0) == 0.0)  # whatever each observation's constant
    dots = jnp.zeros((3, 1))
    panels = {"one": (values, dots, dots), "no energy": (None, dots, dots)}
    assert draw(tmp_path / "new" / "modes.png", panels).stat().st_size > 1000
    assert landscape(None, None) is None


def test_an_unknown_task_is_refused():
    config = benchmark.EbtBenchmarkConfig(tasks=("walker",))
    with pytest.raises(ValueError, match="walker"):
        benchmark.study(config)
