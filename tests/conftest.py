"""Every test: eight CPU devices, float32, and the checks that find silent mistakes.

Rank promotion raises and key reuse raises. A test (or, through ``pytestmark``, a module
with its fixtures) relaxes them with the markers that setup.cfg lists.
"""

import contextlib
import os

# Collectives in flight deadlock a small XLA pool; read once, when jax is imported.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is what most tests take their time for: a quarter of it like this, here and in
# the processes that tests start. `full_compile` is for those that would rather run fast.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_cpu_use_fusion_emitters=false", os.environ.get("XLA_FLAGS", "")]
).strip()
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax
import jaxtyping
import pytest

# The same examples every time, however busy the machine is.
hypothesis.settings.register_profile(
    "house", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("house")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", False)
# Global rather than per test: these settings are part of jit's cache key, so a function
# compiled in a module's fixture would be compiled again in each test.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@contextlib.contextmanager
def _untyped():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@contextlib.contextmanager
def _full_compile():
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    # What is compiled does not know how, and would be given to the others.
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update(name, before)
        jax.clear_caches()


_RELAXED = {
    "allow_rank_promotion": lambda: jax.numpy_rank_promotion("allow"),
    "allow_key_reuse": lambda: jax.debug_key_reuse(False),
    "untyped": _untyped,
    "full_compile": _full_compile,
}


def _relax(node):
    stack = contextlib.ExitStack()
    for marker, context in _RELAXED.items():
        if node.get_closest_marker(marker):
            stack.enter_context(context())
    return stack


@pytest.fixture(autouse=True, scope="module")
def _module_markers(request):
    """A module's markers hold for its module-scoped fixtures too."""
    with _relax(request.node):
        yield


@pytest.fixture(autouse=True)
def _test_markers(request):
    with _relax(request.node):
        yield
