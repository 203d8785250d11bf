"""Where the repository is to be published on GitHub, named once.

The notebooks have to spell the name out, since Colab opens them as they are. To publish
somewhere else, change ``REPOSITORY`` and run

    python docs/repository.py

which rewrites their badges and install lines; ``tests/docs`` holds them to the name here.
"""

import pathlib
import re

REPOSITORY = "emfuse/emfuse_jax"

_NAMED = re.compile(r"(google\.com/github/|git\+https://github\.com/)[\w.-]+/[\w.-]+")


def renamed(text: str) -> str:
    """A notebook's text with the name above wherever it names a repository."""
    return _NAMED.sub(rf"\g<1>{REPOSITORY}", text)


if __name__ == "__main__":
    for path in (pathlib.Path(__file__).parent / "tutorials").glob("*.ipynb"):
        path.write_text(renamed(path.read_text()))
