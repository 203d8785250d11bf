"""Checks the files on the command line, or all that git knows; exits 1 on a fault.

Faults are trailing spaces, a missing newline at the end, unreadable toml or json, and
files over 500 kB.
"""

import json
import pathlib
import subprocess
import sys
import tomllib

LIMIT = 500_000
PARSERS = {".toml": tomllib.loads, ".json": json.loads, ".ipynb": json.loads}


def faults(path: pathlib.Path) -> list[str]:
    """What is wrong with one file."""
    data = path.read_bytes()
    if len(data) > LIMIT:
        return [f"{len(data)} bytes; the limit is {LIMIT}"]
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return []
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line != line.rstrip():
            found.append(f"line {number}: trailing whitespace")
    if text and not text.endswith("\n"):
        found.append("no newline at the end")
    try:
        PARSERS.get(path.suffix, lambda _: None)(text)
    except ValueError as error:
        found.append(str(error))
    return found


def main() -> int:
    """Prints every fault as ``path: what``."""
    names = sys.argv[1:]
    if not names:
        listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True)
        names = listed.stdout.splitlines()
    count = 0
    for name in names:
        path = pathlib.Path(name)
        for fault in faults(path) if path.is_file() else []:
            print(f"{name}: {fault}")
            count += 1
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main())
