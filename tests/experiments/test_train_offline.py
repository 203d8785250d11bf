"""Methods that train on data: one table, flags of their own, runs that resume, load and
are evaluated like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import _tiny_runs as tiny
from emfuse_jax import artifacts
from emfuse_jax.base import SpaceSpec
from emfuse_jax.data.d4rl_reader import write_d4rl
from emfuse_jax.data.dataset import gather_transition, make_dataset
from emfuse_jax.policies.aepo import AepoConfig
from emfuse_jax.policies.iql import IqlConfig
from experiments import (
    _gather,
    _methods,
    _offline,
    _run,
    evaluate,
    presets,
    report,
    train_policy,
)
from experiments._action_landscape import action_slices

SIZES = (
    *("--iql.hidden_sizes=8", "--iql.critics.hidden_sizes=8", "--num_seeds=2"),
    *("--num_updates=20", "--eval_every=10", "--chunk=5", "--batch_size=16"),
    *("--eval_episodes=2", "--method=iql", "--env=hopper"),
)


@pytest.fixture(scope="module", autouse=True)
def _little_compiling(tmp_path_factory):
    before = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMFUSE_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        yield
    jax.config.update("jax_compilation_cache_dir", before)


def command(module, *flags):
    assert module.main([module.__name__, *map(str, flags)]) == 0


@pytest.fixture(scope="module")
def traces():
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, traces):
    """Two seeds of implicit Q-learning on random data, evaluated and reported."""
    root = tmp_path_factory.mktemp("offline")
    data = tiny.write_data(root / "random.hdf5")
    with tiny.TraceCounts() as counts:
        command(train_policy, f"--data={data}", f"--run_dir={root}/iql", *SIZES)
    traces |= counts
    command(evaluate, f"--run_dir={root}/iql", "--episodes=2")
    command(report, f"--runs={root}/iql", f"--out={root}/report")
    return root


def test_a_run_leaves_what_every_training_of_a_policy_leaves(folder, traces):
    left = {path.name for path in (folder / "iql").iterdir()}
    assert left == {
        *("config.json", "provenance.json", "stages.json", "checkpoints", ".lock"),
        *("metrics.jsonl", "tensorboard", "model.json", "result.json", "policy"),
        "evaluation.json",
    }
    config = artifacts.read_json(folder / "iql" / "config.json")
    assert (config["kind"], config["config"]["method"]) == ("train_policy", "iql")
    rows = tiny.rows_of(folder / "iql")
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert [r["update"] for r in rows if "normalized_return" in r] == [10, 20]
    assert (traces["run_chunk"], traces["act"]) == (1, 1)


def test_the_run_loads_as_the_policy_that_was_evaluated(folder):
    trained = artifacts.load_run(folder / "iql")
    assert (trained.step, trained.spec) == (20, SpaceSpec(11, 3))
    assert jax.tree.leaves(trained.params)[0].shape[0] == 2
    result = artifacts.read_json(folder / "iql" / "evaluation.json")
    assert np.shape(result["episodes"]) == (2, 2)
    # The seeds are different policies on different episodes.
    assert result["per_seed"][0] != result["per_seed"][1]
    section = artifacts.read_json(folder / "report" / "report.json")["sections"]
    (row,) = section["Returns"]
    assert (row["origin"], row["seeds"]) == ("iql on random", 2)


def test_the_report_draws_the_energy_of_actions_and_what_is_drawn_from_it(folder):
    text = (folder / "report" / "report.md").read_text()
    assert "## Energies of actions" in text
    assert (folder / "report" / "figures" / "actions.png").stat().st_size > 1000
    (run,) = _gather.read_runs([str(folder / "iql")])
    data = action_slices([run])
    assert np.shape(data["energies"]["iql"]) == (61, 61)
    assert np.isfinite(data["energies"]["iql"]).all()
    assert np.shape(data["samples"]["iql"]) == (2, 64)
    assert action_slices([run._replace(config={"method": "sac"})]) == {}
    moved = run._replace(config=run.config | {"data": ["gone.hdf5"]})
    with pytest.raises(FileNotFoundError, match=r"gone\.hdf5"):
        action_slices([moved])


def test_a_run_that_stopped_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    save = _run.Run.save

    def stopping(self, step, *args, **kwargs):
        if step == 20:
            raise Stop
        save(self, step, *args, **kwargs)

    flags = (f"--data={folder}/random.hdf5", f"--run_dir={tmp_path}/again", *SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(_run.Run, "save", stopping)
        with pytest.raises(Stop):
            train_policy.main(["train_policy", *flags])
    assert artifacts.steps(tmp_path / "again" / "checkpoints") == [10]
    command(train_policy, *flags)
    assert tiny.rows_of(tmp_path / "again") == tiny.rows_of(folder / "iql")
    for name in ("checkpoints", "policy"):
        ours, whole = (
            tiny.digests(p / name) for p in (tmp_path / "again", folder / "iql")
        )
        assert ours == whole


def test_every_method_of_the_table_initialises_updates_and_acts():
    spec, rows = SpaceSpec(4, 2), 8
    arrays = tiny.arrays(rows=40, observation=4, action=2)
    dataset = jax.tree.map(jnp.asarray, make_dataset(**arrays))
    for name in _methods.OFFLINE:
        config = _methods.config_class(_offline.OfflineConfig, name)()
        assert config.method == name
        own = _methods.own_config(config)
        policy = artifacts.KINDS[name].build(own, spec)
        data = artifacts.from_json(type(own), artifacts.to_json(own))
        assert data == own

        options = _offline.init_options(policy, dataset)

        def one_step(key, dataset, policy=policy, options=options):
            keys = jax.random.split(key, 3)
            state = policy.init(keys[0], **options)
            batch = gather_transition(dataset, jnp.arange(rows))
            state, metrics = policy.update(keys[1], state, batch)
            return policy.act(state.params, keys[2], batch.observation), metrics

        action, metrics = jax.eval_shape(one_step, jax.random.key(0), dataset)
        assert action.shape == (rows, 2), name
        assert {m.shape for m in metrics.values()} == {()}, name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method=iqll", "--iqll.x=1"], "unknown method 'iqll'; did you mean 'iql'?"),
        (["--method=iql", "--iql.critics.expectile=1"], "--iql.critics: expectile=1.0"),
        (["--method=aepo", "--aepo.guidance.scale=-1"], "guidance scale=-1.0"),
        (["--method=aepo", "--aepo.critics.expectile=0"], "expectile=0.0"),
        (["--method=ebt", "--ebt.act_steps=0"], "act_steps=0"),
        (["--method=ibc", "--ibc.chain_steps=0"], "chain_steps=0"),
        (["--method=iql", "--sac.discount=1"], "sac.discount"),
        (["--method=iql", "--run_dir=x"], "--data is required"),
        (["--method=bc", "--num_updates=1500"], "num_updates=1500 must be a multiple"),
        (["--method=bc", "--return_range=0"], "return_range=0.0; expected a positive"),
    ],
)
def test_bad_flags_are_refused_by_name(capsys, flags, words):
    assert train_policy.main(["train_policy", *flags]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_environment_has_to_be_that_of_the_data(tmp_path, capsys):
    data = tiny.write_data(tmp_path / "wide.hdf5", observation=17, action=6)
    flags = (f"--data={data}", f"--run_dir={tmp_path}/run", *SIZES)
    assert train_policy.main(["train_policy", *flags]) == 2
    assert "observation_size=17" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_has_the_flags_of_the_method_and_of_no_other(capsys):
    command(train_policy, "--method=iql", "--help")
    text = capsys.readouterr().out
    assert "--iql.critics.expectile=0.7" in text
    assert "upper bound" in text
    assert "--bc.learning_rate" not in text
    assert "--model" not in text


def test_scaled_rewards_give_returns_of_the_wanted_range():
    dataset = make_dataset(**tiny.arrays())
    scaled = _offline.scale_rewards(dataset, 1000.0)
    returns = scaled.reward.reshape(10, 20).sum(axis=1)
    assert returns.max() - returns.min() == pytest.approx(1000.0, rel=1e-4)
    same = dataset._replace(reward=np.ones_like(dataset.reward))
    with pytest.raises(ValueError, match="no range to scale"):
        _offline.scale_rewards(same, 1000.0)
    assert _offline.scale_rewards(same, None) is same


def test_presets_hold_the_methods_own_settings():
    for method in _methods.OFFLINE:
        config_cls = _methods.config_class(_offline.OfflineConfig, method)
        made = _offline.method_presets(config_cls, method)
        assert tuple(made) == presets.NAMES
        for name in made:
            own = presets.OFFLINE.get(method, lambda name, cls=config_cls: None)(name)
            default = getattr(config_cls(), method)
            assert getattr(made[name](), method) == (own or default)
    paper = _offline.method_presets(config_cls, "ibc")["paper"]()
    assert paper.num_updates == 1_000_000
    assert presets.aepo("paper").behaviour.network != AepoConfig().behaviour.network


def test_settings_of_a_method_come_from_its_own_class():
    config_cls = _methods.config_class(_offline.OfflineConfig, "iql")
    assert config_cls().iql == IqlConfig()
    assert config_cls is _methods.config_class(_offline.OfflineConfig, "iql")
    with pytest.raises(ValueError, match="unknown method 'sac'"):
        _methods.config_class(_offline.OfflineConfig, "sac")


def test_frames_and_chunks_reach_the_policy_and_its_acting(tmp_path):
    root = tmp_path
    # Returns that are all the same: nothing to scale, and bc does not look at them.
    arrays = tiny.arrays()
    arrays["rewards"] = np.ones_like(arrays["rewards"])
    data = root / "random.hdf5"
    write_d4rl(data, arrays)
    flags = (
        *("--method=bc", "--bc.hidden_sizes=8", "--env=hopper", "--eval_episodes=2"),
        *("--num_updates=5", "--eval_every=5", "--chunk=5", "--batch_size=4"),
        *("--plan.num_frames=2", "--plan.horizon=3", "--plan.execute=2"),
    )
    command(train_policy, f"--data={data}", f"--run_dir={root}/bc", *flags)
    trained = artifacts.load_run(root / "bc")
    assert trained.spec == SpaceSpec(22, 9)
    assert trained.description["plan"]["execute"] == 2
    command(evaluate, f"--run_dir={root}/bc", "--episodes=2")
    assert np.shape(
        artifacts.read_json(root / "bc" / "evaluation.json")["episodes"]
    ) == (
        1,
        2,
    )


def test_transformers_take_their_sizes_from_the_plan_and_values_have_none():
    plan = _offline.ChunkConfig(num_frames=2, horizon=4, execute=2)
    for name in ("ebt", "diffusion_transformer"):
        config = _methods.config_class(_offline.OfflineConfig, name)(plan=plan)
        own = _methods.own_config(config)
        assert (own.num_frames, own.horizon) == (2, 4)
    for name in _methods.VALUED:
        with pytest.raises(ValueError, match=f"{name} values single actions"):
            _methods.config_class(_offline.OfflineConfig, name)(plan=plan)
