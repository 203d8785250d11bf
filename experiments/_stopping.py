"""SIGTERM, which schedulers send before they kill: save at the border and say so.

While a run trains, the signal only raises a flag: the chunk is finished, a checkpoint is
written and the command exits with `EXIT_STATUS`, and the same command resumes bit for bit.
A signal that comes seconds later ends the process at once; so does the first one outside of
training, where there is nothing that a rerun would not make again.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EXIT_STATUS = 75
"""EX_TEMPFAIL of ``sysexits.h``: not finished, nothing wrong, give the same command again.
(143 is what a shell shows for a process that SIGTERM ended before it could save.)"""

_PATIENCE = 3.0
"""Seconds in which a repeated signal is the same request: schedulers signal every process
of a job, and `experiments.demo` passes its own on to its jobs."""


class StoppedError(Exception):
    """The run was asked to stop, and has saved.

    Args:
        what: was saved, or is left to do.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"stopped by SIGTERM {what}; the same command resumes")


@contextlib.contextmanager
def until_asked(what: str = "the end of this chunk") -> Iterator[Callable[[], bool]]:
    """Holds SIGTERM back inside the body.

    Args:
        what: is waited for, for the message.

    Yields:
        ``asked()``: whether the signal has come. Where handlers cannot be set, outside of
        the main thread, always False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[float] = []

    def handler(*_: Any) -> None:
        came.append(time.monotonic())
        if len(came) == 1:
            # A buffered stream may be in the middle of a write, and refuses another.
            os.write(2, f"SIGTERM: stopping at {what}\n".encode())
        elif came[-1] - came[0] > _PATIENCE:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
