"""One process per run directory: a lock that says who holds it.

The kernel holds the lock itself (``flock``) and lets go of it however the process ends, so
that a killed run never stands in its own way. The file names its holder, for people, and
for file systems whose locks do not reach another host or do not exist at all.
"""

import datetime
import errno
import json
import os
import pathlib
import socket
from typing import NamedTuple

LOCK_FILE = ".lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class Owner(NamedTuple):
    """Who holds a lock.

    Attributes:
        pid: of the process.
        host: where it runs.
        time: since when, ISO 8601 with the zone.
        boot: of that machine, which its name may outlive or not; empty where unknown.
    """

    pid: int
    host: str
    time: str
    boot: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.time}"


class Lock(NamedTuple):
    """A lock that is held, until `release`; made by `take`.

    Attributes:
        descriptor: of the open file.
        taken_over: the owner that ended without letting go, None where it did.
    """

    descriptor: int
    taken_over: Owner | None = None

    def release(self) -> None:
        """Lets another process have the directory."""
        try:
            os.truncate(self.descriptor, 0)
        finally:
            os.close(self.descriptor)


def take(folder: pathlib.Path) -> Lock:
    """Locks a directory for this process.

    Args:
        folder: an existing directory.

    Raises:
        ValueError: if another process holds it; the text names it. A lock whose process
            has ended is taken over; of another host's that cannot be known where the file
            system's locks do not reach, so that one is named too.
        OSError: if the lock cannot be written.
    """
    path = folder / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        free = _flock(descriptor)
        found = _read(descriptor)
        if free is False or (found is not None and _may_live(found, free)):
            raise ValueError(_refusal(folder, found, certain=free is False))
        owner = Owner(
            os.getpid(),
            socket.gethostname(),
            datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            _boot(),
        )
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner._asdict()).encode() + b"\n", 0)
    except BaseException:
        os.close(descriptor)
        raise
    return Lock(descriptor, found)


def owner(folder: pathlib.Path) -> Owner | None:
    """Who holds a directory's lock, or ended without letting go; None where nobody."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _read(descriptor)
    finally:
        os.close(descriptor)


def _boot() -> str:
    """What tells this boot of this machine from every other; empty where nothing does."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _flock(descriptor: int) -> bool | None:
    """Whether the kernel gave us the lock; None where the file system has none."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _read(descriptor: int) -> Owner | None:
    try:
        data = json.loads(os.pread(descriptor, 4096, 0))
        boot = str(data.get("boot", ""))
        return Owner(int(data["pid"]), str(data["host"]), str(data["time"]), boot)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # empty, or cut short by a kill
        return None


def _may_live(found: Owner, free: bool | None) -> bool:
    """Whether a recorded owner may still be at work, though we could have the lock."""
    same_host = found.host == socket.gethostname()
    boots = (found.boot, _boot())
    same_boot = boots[0] == boots[1] if all(boots) else same_host
    if not same_boot:
        return not same_host  # the name of a machine that has booted since
    if free:
        return False  # of one kernel, which would not have given it twice
    if not same_host:
        return True  # perhaps a container, whose processes have other numbers
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return found.pid != os.getpid()


def _refusal(folder: pathlib.Path, found: Owner | None, *, certain: bool) -> str:
    who = "another process" if found is None else str(found)
    if certain:
        return (
            f"{folder} is in use by another process ({who}); wait for it, or choose "
            "another --run_dir"
        )
    return (
        f"{folder} may be in use by another process: {who} has not let go of it; if that "
        f"process has ended, delete {folder / LOCK_FILE}, else choose another --run_dir"
    )
