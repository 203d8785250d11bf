"""Builds the documentation with its guides and notebooks executed; a warning is an error.

    python docs/build.py FOLDER [options of sphinx-build]

The pages are then ``FOLDER/html/index.html``. Sphinx reads a copy: what is generated or
executed must not end up among the sources. ``-D nb_execution_mode=off`` runs no cell.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import generate_api

DOCS = pathlib.Path(__file__).resolve().parent


def main(folder: pathlib.Path, options: list[str]) -> int:
    """Sphinx's exit status; warnings go to stderr."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(DOCS, source, ignore=unwanted)
    shutil.copy(DOCS.parent / "CHANGELOG.md", folder)
    generate_api.main(source / "api")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    command += ["-d", folder / "doctrees", *options, source, folder / "html"]
    # A kernel chooses its own backend, the one whose figures come out, if none is set.
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2:]))
