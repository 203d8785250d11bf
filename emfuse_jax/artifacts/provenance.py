"""Where a number comes from: commit, versions, devices, command line."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "mujoco", "gymnasium")


def provenance(*, seed: int | None = None) -> dict[str, Any]:
    """What to write beside a result, as a JSON value.

    Starts jax's backend, so call it after ``jax.distributed.initialize`` and after
    anything else that must come before the first use of a device.

    Args:
        seed: the seed of the run, if it has one.

    Returns:
        A dict with ``time``, ``command``, ``seed``, ``commit``, ``dirty`` (None outside
        a checkout), ``versions``, ``python``, ``devices``, ``cpu`` and ``cores``.

    Example:
        >>> sorted(provenance(seed=3))[:4]
        ['command', 'commit', 'cores', 'cpu']
    """
    import jax

    commit, dirty = _git_state(pathlib.Path(__file__).parents[2])
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": seed,
        "commit": commit,
        "dirty": dirty,
        "versions": {
            # Not imported: the root imports every floor, this one too.
            "emfuse_jax": sys.modules["emfuse_jax"].__version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        "python": platform.python_version(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }


def _git_state(folder: pathlib.Path) -> tuple[str | None, bool | None]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # A virtual environment inside some other checkout is not our history.
        if pathlib.Path(git("rev-parse", "--show-toplevel")) != folder.resolve():
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
