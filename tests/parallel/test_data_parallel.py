import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emfuse_jax import artifacts
from emfuse_jax.base import Dynamics, Learner, Policy, TransitionModel
from emfuse_jax.loops import fit
from emfuse_jax.parallel.data_parallel import data_parallel, pmap_update
from emfuse_jax.parallel.mesh import make_mesh, replicate
from parallel._work import LEARNING_RATE, energy_learner, rows, train

ROWS = 64


@pytest.fixture(scope="module")
def data():
    return jnp.asarray(rows(ROWS))


@pytest.fixture(scope="module")
def alone(data):
    return jax.jit(lambda k, d: train(energy_learner(), k, d))(new_key(), data)


def new_key():
    """The run's key, made anew: a key is consumed once."""
    return jax.random.key(3)


def assert_equal(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sizes", [{"data": 1}, {"data": 4}, {"data": 8}, {"other": 2, "data": 4}], ids=str
)
def test_gradients_and_three_sgd_steps_equal_one_device(sizes, data, alone):
    learner = data_parallel(energy_learner(), make_mesh(sizes))
    state, metrics = jax.jit(lambda k, d: train(learner, k, d))(new_key(), data)
    assert set(metrics) == {"loss", "d_first", "d_last"}  # loss and gradients
    assert_equal((state, metrics), alone)
    assert len(state.params["last"].sharding.device_set) == np.prod([*sizes.values()])


def test_a_gradient_that_is_n_times_too_large_would_be_seen(data, alone):
    wrong = energy_learner(learning_rate=8 * LEARNING_RATE)
    state, _ = jax.jit(lambda k, d: train(wrong, k, d))(new_key(), data)
    gap = jnp.max(jnp.abs(state.params["last"] - alone[0].params["last"]))
    assert gap > 1e-2
    assert jnp.min(jnp.abs(alone[1]["d_last"][0])) > 1e-4


def test_devices_exchange_sums_and_not_rows(data):
    learner = data_parallel(energy_learner(), make_mesh({"data": 8}))
    state = learner.init(new_key())
    compiled = jax.jit(learner.update).lower(new_key(), state, data).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text
    # A device's own rows and their negatives, and nowhere those of all devices.
    assert f"f32[{ROWS // 8},4,3]" in text
    assert f"f32[{ROWS},4,3]" not in text


def test_rows_on_another_axis(data, alone):
    """A `History` has its rows on axis 1; what is not a row is left alone."""
    plain = energy_learner()
    learner = Learner(
        plain.init, lambda key, s, b: plain.update(key, s, b["rows"][0] * b["scale"])
    )
    parallel = data_parallel(
        learner, make_mesh({"data": 8}), batch_axes={"rows": 1, "scale": None}
    )
    batch = {"rows": jnp.stack([data, -data]), "scale": jnp.float32(1.0)}
    assert_equal(jax.jit(lambda k, d: train(parallel, k, d))(new_key(), batch), alone)


def test_other_fields_of_a_learner_are_kept():
    mesh = make_mesh({"data": -1})
    plain = energy_learner()
    model = TransitionModel(predict=min, energy=min, uncertainty=min)
    policy = data_parallel(Policy(*plain, act=min, energy=None), mesh)
    dynamics = data_parallel(Dynamics(*plain, model=model), mesh)
    assert isinstance(policy, Policy)
    assert policy.act is min
    assert isinstance(dynamics, Dynamics)
    assert dynamics.model is model


def test_fit_on_the_host_path_compiles_once_and_donates(data):
    traces = []
    plain = energy_learner()

    def update(key, state, batch):
        traces.append(0)
        return plain.update(key, state, batch)

    counted = Learner(plain.init, update)

    def sample_batch(key, arrays):
        return arrays[jax.random.randint(key, (16,), 0, ROWS)]

    def run(learner, state, on_chunk):
        return fit(
            new_key(),
            learner,
            state,
            sample_batch,
            4,
            data=data,
            chunk=2,
            on_chunk=on_chunk,
        )

    expected, _ = run(plain, plain.init(new_key()), lambda *_: None)
    traces.clear()
    parallel = data_parallel(counted, make_mesh({"data": -1}))
    state = parallel.init(new_key())
    result, metrics = run(parallel, state, lambda *_: None)
    assert len(traces) == 1
    assert metrics["loss"].shape == (2,)
    assert state.params["first"].is_deleted()
    assert_equal(result, expected)


def test_the_second_update_reuses_the_program(data):
    learner = data_parallel(energy_learner(), make_mesh({"data": -1}))
    update = jax.jit(learner.update)
    state, _ = update(new_key(), learner.init(new_key()), data)
    update(new_key(), state, data)
    assert update._cache_size() == 1
    unplaced = jax.jit(learner.update)
    state, _ = unplaced(new_key(), energy_learner().init(new_key()), data)
    unplaced(new_key(), state, data)
    assert unplaced._cache_size() == 2


def test_a_state_that_the_caller_keeps_survives_donation(data):
    learner = data_parallel(energy_learner(), make_mesh({"data": -1}))
    pretrained = energy_learner().init(new_key())
    placed = replicate(pretrained, make_mesh({"data": -1}))
    jax.jit(learner.update, donate_argnums=1)(new_key(), placed, data)
    assert placed.params["first"].is_deleted()
    assert np.isfinite(np.asarray(pretrained.params["first"])).all()


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_a_run_saved_on_some_devices_resumes_on_others(
    before, after, data, alone, tmp_path
):
    learner = data_parallel(energy_learner(), make_mesh({"data": before}))
    state, _ = jax.jit(lambda k, d: train(learner, k, d, 2))(new_key(), data)
    artifacts.save(tmp_path, 2, state)
    learner = data_parallel(energy_learner(), make_mesh({"data": after}))
    found = artifacts.restore_latest(tmp_path, learner.init(jax.random.key(0)))
    assert len(found.tree.params["last"].sharding.device_set) == after
    state, _ = jax.jit(lambda k, s, d: train(learner, k, d, 1, s, start=2))(
        new_key(), found.tree, data
    )
    assert_equal(state, alone[0])


def test_errors_name_the_numbers(data):
    mesh = make_mesh({"data": 8})
    learner = data_parallel(energy_learner(), mesh)
    state = learner.init(new_key())
    with pytest.raises(ValueError, match=r"60 rows .* by 8 devices.* 56 and 64"):
        jax.jit(learner.update)(new_key(), state, data[:60])
    with pytest.raises(ValueError, match="no row axis 0"):
        learner.update(new_key(), state, jnp.float32(1.0))
    with pytest.raises(ValueError, match="no axis 'rows'"):
        data_parallel(energy_learner(), mesh, axis="rows")


def test_pmap_update_takes_batches_per_device(data, alone):
    plain = energy_learner()
    update = pmap_update(plain, donate_state=True)
    state = plain.init(new_key())
    for number in range(3):
        state, metrics = update(
            jax.random.fold_in(new_key(), number), state, data.reshape(8, -1, 3)
        )
    assert_equal(state, alone[0])
    assert_equal(metrics["loss"], alone[1]["loss"][-1])
    assert state.params["first"].sharding.is_fully_replicated


def test_pmap_update_joins_the_row_axis(data, alone):
    plain = energy_learner()
    lagged = Learner(plain.init, lambda key, s, b: plain.update(key, s, b[1]))
    update = pmap_update(lagged, devices=jax.devices()[:4], batch_axes=1)
    rows = data.reshape(4, 1, -1, 3)
    batch = jnp.concatenate([-rows, rows], axis=1)  # [device, lag, rows, dim]
    state = plain.init(new_key())
    for number in range(3):
        state, _ = update(jax.random.fold_in(new_key(), number), state, batch)
    assert_equal(state, alone[0])


def test_pmap_update_errors(data):
    update = pmap_update(energy_learner())
    state = energy_learner().init(new_key())
    with pytest.raises(ValueError, match=r"\(64, 3\) for 8 devices"):
        update(new_key(), state, data)
    shared = pmap_update(energy_learner(), batch_axes=None)
    with pytest.raises(ValueError, match="use data_parallel"):
        shared(new_key(), state, data.reshape(8, -1, 3))
