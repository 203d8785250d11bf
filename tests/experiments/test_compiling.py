"""What takes time to compile is told of; what comes from the cache says so."""

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring

from experiments import _compiling


@pytest.fixture
def teller(monkeypatch):
    """Follows events of this test's own, with a patience of 50 ms."""
    monkeypatch.setattr(_compiling, "PATIENCE", 0.05)
    with _compiling.told():
        yield


def _compile(name, trace, seconds, *, kept=False, wait=0.0):
    import time

    facts = {"fun_name": f"jit({name})"}
    monitoring.record_event_duration_secs(_compiling._TRACE, trace, **facts)
    monitoring.record_event_duration_secs(_compiling._LOWER, 0.01, **facts)
    monitoring.record_scalar(_compiling._COMPILE, 0.0, **facts)
    time.sleep(wait)
    if kept:
        monitoring.record_event(_compiling._HIT)
    monitoring.record_event_duration_secs(_compiling._COMPILE, seconds, **facts)


def test_what_takes_long_is_announced_and_told(teller, capsys):
    with _compiling.of("train etm"):
        _compile("run_chunk", 1.0, 2.0, wait=0.3)
    assert capsys.readouterr().err.splitlines() == [
        "compiling run_chunk (train etm) …",
        "compiled run_chunk (train etm) in 3.0 s",
    ]


def test_jobs_may_end_in_any_order(teller, capsys):
    first, second = _compiling.of("first"), _compiling.of("second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    _compile("f", 1.0, 1.0)
    second.__exit__(None, None, None)
    _compile("g", 1.0, 1.0)
    assert capsys.readouterr().err.splitlines() == [
        "compiled f (second) in 2.0 s",
        "compiled g in 2.0 s",
    ]


def test_hits_say_so_and_what_is_quick_is_not_spoken_of(teller, capsys):
    _compile("run_chunk", 1.0, 0.2, kept=True)
    _compile("add", 0.001, 0.002)
    assert capsys.readouterr().err.splitlines() == [
        "compiled run_chunk in 1.2 s, from the cache of compiled programs",
    ]
    _compile("run_chunk", 1.0, 0.2)  # the hit before was another program's
    assert "cache" not in capsys.readouterr().err


def test_jax_does_send_these_events(monkeypatch, capsys):
    monkeypatch.setattr(_compiling, "PATIENCE", 0.0)

    def named(x):
        return jnp.sin(x) + 1.25

    program = jax.jit(named)
    with _compiling.told():
        program(jnp.ones(3))
        assert "compiled named in 0." in capsys.readouterr().err
        program(jnp.ones(3))
    program(jnp.ones(4))  # told of only inside
    assert "named" not in capsys.readouterr().err
