"""The code cells of the guides, run in order; the documentation build runs them too."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
_CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def cells(path):
    return _CELL.findall(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_cells_run_and_their_assertions_hold(path, tmp_path):
    """In a process of their own: a guide may set the number of devices."""
    script = tmp_path / "cells.py"
    script.write_text("\n".join(cells(path)))
    dropped = ("XLA_FLAGS", "NPROC", "JAX_NUM_CPU_DEVICES")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout


def test_every_guide_has_cells_that_run():
    assert GUIDES
    for path in GUIDES:
        assert cells(path), path
        assert path.read_text().startswith("---\nfile_format: mystnb\n"), path
