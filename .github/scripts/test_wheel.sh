#!/bin/sh
# Runs the tests against an installed wheel, from a directory without the package's sources.
#
#     .github/scripts/test_wheel.sh PYTHON FOLDER [pytest options or paths]
#
# PYTHON has the wheel and its [test] extra installed; FOLDER is made. Tests of the checkout
# itself (its pages, files and documentation) stay behind.
set -eu
python=$1
away=$2
shift 2
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$away"
cp -R "$root/tests" "$root/experiments" "$root/benchmarks" "$root/slurm" "$away"
cp "$root/setup.cfg" "$root/README.md" "$root/WORKSPACE.md" "$root/Makefile" "$away"
rm -rf "$away/tests/architecture" "$away/tests/docs"
cd "$away"
"$python" - "$root" <<'PYTHON'
import pathlib
import sys

import emfuse_jax

place = pathlib.Path(emfuse_jax.__file__).resolve()
root = pathlib.Path(sys.argv[1]).resolve()
if place.is_relative_to(root / "emfuse_jax"):
    sys.exit(f"{place} is the checkout's, not the wheel's")
policies = list((place.parent / "data" / "behaviour").glob("*.npz"))
if not policies or not (place.parent / "py.typed").exists():
    sys.exit(f"{place.parent} lacks the packaged policies or py.typed")
print(f"emfuse_jax {emfuse_jax.__version__} in {place.parent}")
PYTHON
NPROC=16 XLA_FLAGS="--xla_cpu_multi_thread_eigen=false" exec "$python" -m pytest -q "$@"
