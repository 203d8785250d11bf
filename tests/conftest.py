"""Every test: eight CPU devices, float32, and the checks that find silent mistakes.

Rank promotion raises and key reuse raises. A test (or, through ``pytestmark``, a module
with its fixtures) relaxes them with the markers that setup.cfg lists.
"""

import contextlib
import os

# Collectives in flight deadlock a small XLA pool; read once, when jax is imported.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
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


_quick = []
"""Who asked for quick compiling: a module and, inside it, a test."""


@contextlib.contextmanager
def _quick_compile():
    _quick.append(None)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        _quick.pop()
        jax.config.update("jax_disable_most_optimizations", bool(_quick))
        if not _quick:
            # What is compiled does not know how: a later module, which compares with
            # another process bit by bit, would be given it.
            jax.clear_caches()


_RELAXED = {
    "allow_rank_promotion": lambda: jax.numpy_rank_promotion("allow"),
    "allow_key_reuse": lambda: jax.debug_key_reuse(False),
    "untyped": _untyped,
    # Half the time to compile, for modules that ask for no speed.
    "quick_compile": _quick_compile,
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
