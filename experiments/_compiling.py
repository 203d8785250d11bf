"""What is being compiled, how long it took, and the folder that keeps it for the next run.

Programs that are quickly traced and compiled, which most are, are not spoken of.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

_TRACE = "/jax/core/compile/jaxpr_trace_duration"
_LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILE = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"

PATIENCE = 2.0
"""Seconds: what takes longer to compile is announced, and what took longer in all, with
tracing, is told of."""

_open: list[str] = []
"""What is compiled for. Bodies may end in another order than they began: jobs do."""


def use_cache() -> None:
    """Keeps compiled programs on the disk between runs.

    ``EMFUSE_JAX_CACHE`` is the folder (default ``~/.cache/emfuse_jax/jax``); ``0`` or an
    empty value switches it off. jax's own ``JAX_COMPILATION_CACHE_DIR`` goes first.
    """
    import jax

    folder = os.environ.get("EMFUSE_JAX_CACHE", "~/.cache/emfuse_jax/jax")
    if folder in ("", "0") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def of(what: str) -> Iterator[None]:
    """Inside the body, messages say that what is compiled is for ``what``."""
    _open.append(what)
    try:
        yield
    finally:
        _open.remove(what)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Inside the body, every program that takes time to compile is told of, on stderr."""
    from jax import monitoring

    teller = _Teller()
    monitoring.register_scalar_listener(teller.starts)
    monitoring.register_event_listener(teller.happens)
    monitoring.register_event_duration_secs_listener(teller.ends)
    try:
        yield
    finally:
        monitoring.unregister_scalar_listener(teller.starts)
        monitoring.unregister_event_listener(teller.happens)
        monitoring.unregister_event_duration_listener(teller.ends)


class _Teller(threading.local):
    """Follows a program from its trace to its executable, in each thread by itself."""

    def __init__(self) -> None:
        self._seconds = 0.0  # of tracing and lowering, before compiling
        self._kept = False
        self._timer: threading.Timer | None = None

    def starts(self, event: str, value: float, **facts: Any) -> None:
        del value
        if event != _COMPILE:
            return
        self._kept = False
        # Only later, since what the cache has is there in no time.
        words = f"compiling {_name(facts)} …"
        self._timer = threading.Timer(PATIENCE, _say, [words])
        self._timer.daemon = True
        self._timer.start()

    def happens(self, event: str, **facts: Any) -> None:
        del facts
        self._kept |= event == _HIT

    def ends(self, event: str, duration: float, **facts: Any) -> None:
        if event == _TRACE:
            # Functions inside of functions end first: the outermost holds them all.
            self._seconds = max(self._seconds, duration)
        elif event == _LOWER:
            self._seconds += duration
        elif event == _COMPILE:
            seconds, self._seconds = self._seconds + duration, 0.0
            if self._timer is not None:
                self._timer.cancel()
            if seconds > PATIENCE:
                how = ", from the cache of compiled programs" if self._kept else ""
                _say(f"compiled {_name(facts)} in {seconds:.1f} s{how}")


def _name(facts: dict[str, Any]) -> str:
    name = str(facts.get("fun_name", "a program"))
    name = name.removeprefix("jit(").removesuffix(")")
    return f"{name} ({_open[-1]})" if _open else name


def _say(text: str) -> None:
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None and sys.stderr.isatty():
        tqdm.tqdm.write(text, file=sys.stderr)  # above the bar, if there is one
    else:
        print(text, file=sys.stderr, flush=True)
