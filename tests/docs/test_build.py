"""The documentation builds without a warning, its guides and notebooks executed."""

import os
import pathlib
import pickle
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXECUTED = {
    *(f"guides/{path.stem}" for path in (DOCS / "guides").glob("*.md")),
    *(f"tutorials/{path.stem}" for path in (DOCS / "tutorials").glob("*.ipynb")),
}


@pytest.mark.slow
def test_the_documentation_builds_and_its_cells_run(tmp_path):
    """As `make docs` does. The cells assert what their text says."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # A guide sets the number of devices itself.
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    command = [sys.executable, str(DOCS / "build.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    saved = (tmp_path / "doctrees" / "environment.pickle").read_bytes()
    executed = pickle.loads(saved).nb_metadata  # Sphinx has just written it
    assert {page for page, data in executed.items() if "exec_data" in data} == EXECUTED
    assert all(executed[page]["exec_data"]["succeeded"] for page in EXECUTED)
    for page in ("index", "migration", "api/emfuse_jax.energy", *EXECUTED):
        assert (tmp_path / "html" / f"{page}.html").exists(), page


def test_a_warning_fails_the_build(tmp_path):
    """Sphinx on one page with a link to nowhere, with the settings of `conf.py`."""
    for name in ("conf.py", "repository.py"):
        (tmp_path / name).write_text((DOCS / name).read_text())
    (tmp_path / "index.md").write_text("# A page\n\n[nowhere](missing.md)\n")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", tmp_path, tmp_path / "html"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "missing.md" in done.stderr
