"""A progress bar on a terminal, plain lines elsewhere, and seconds per stage."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from emfuse_jax.artifacts.config import read_json, write_json
from experiments import _compiling


class Progress:
    """Shows how far a loop is; use as a context manager.

    Args:
        total: the last step.
        initial: steps done before, by an earlier start of the run.
        description: what is being done.
        unit: what a step is.
        interval: seconds between two lines where there is no terminal.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        description: str = "",
        unit: str = "step",
        interval: float = 15.0,
    ) -> None:
        self._total, self._initial, self._unit = total, initial, unit
        self._description, self._interval = description or "progress", interval
        self._start = self._printed = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            import tqdm

            options = {"total": total, "initial": initial, "unit": unit}
            self._bar = tqdm.tqdm(desc=description, dynamic_ncols=True, **options)

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Says that ``step`` is done, and shows the scalars among ``metrics``."""
        shown = {k: f"{float(v):.4g}" for k, v in (metrics or {}).items() if _scalar(v)}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._printed < self._interval and step < self._total:
            return
        self._printed = now
        rate = (step - self._initial) / max(now - self._start, 1e-9)
        words = [f"{self._description}: {step}/{self._total} {self._unit}s"]
        words += [f"{rate:.3g}/s", *(f"{k}={v}" for k, v in shown.items())]
        print("  ".join(words), file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class Stages:
    """Seconds per stage in a JSON file, summed over every start of the run: of the clock
    under the stage's name, and of this process's CPU under ``"<name>, cpu"``.

    Args:
        path: the file; what it holds already is added to.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._seconds = dict(read_json(path)) if path.exists() else {}
        self._open: dict[str, float] = {}
        self._open_cpu: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the body, and names it where something is compiled for it; stages may be
        nested."""
        if name in self._open:
            raise ValueError(
                f"stage {name!r} is already open; give the inner one a name"
            )
        self._open[name] = time.monotonic()
        self._open_cpu[name] = time.process_time()
        try:
            with _compiling.of(name):
                yield
        except BaseException:
            # On a full disk, that the seconds cannot be written is not the news.
            with contextlib.suppress(OSError):
                self.flush()
            raise
        else:
            self.flush()
        finally:
            del self._open[name], self._open_cpu[name]

    def flush(self) -> None:
        """Writes the seconds so far, of open stages too, so that a kill loses few."""
        now, cpu = time.monotonic(), time.process_time()
        for name in self._open:
            self._add(name, now - self._open[name])
            self._add(f"{name}, cpu", cpu - self._open_cpu[name])
            self._open[name], self._open_cpu[name] = now, cpu
        write_json(self._path, {k: round(v, 3) for k, v in self._seconds.items()})

    def seconds(self, name: str) -> float:
        """What a stage has taken up to the last `flush`, 0 if it never began."""
        return self._seconds.get(name, 0.0)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self.seconds(name) + seconds


def _scalar(value: Any) -> bool:
    return getattr(value, "ndim", 0) == 0 and not isinstance(value, str | list)
