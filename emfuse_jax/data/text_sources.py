"""Where text is looked for: by path, or among what Python and Debian ship.

Each default domain lists several places, since few machines have them all: a slim
container has no manual pages, but Python's own sources, the headers of Python and NumPy
and the read-me files of installed packages are there wherever this package is.
"""

import dataclasses
import difflib
import fnmatch
import glob
import importlib.util
import os
import pathlib
import sysconfig
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """The files of one domain.

    Attributes:
        name: of the domain.
        patterns: files, folders (all files below them that are not hidden) or globs; a
            path that exists is never read as a glob.
        exclude: globs of names (``folder/below/file``) that are left out.
        strict: whether a file that is not UTF-8 is an error; otherwise it is left out.
    """

    name: str
    patterns: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    strict: bool = True

    def excludes(self, name: str) -> bool:
        """Whether a file of this name is left out."""
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.exclude)


def default_sources() -> dict[str, TextSource]:
    """Domains by name, in the order in which they are preferred; not all may exist here.

    ``python``: the standard library. ``man``: manual pages, sections 1, 3, 5 and 8, as
    roff. ``c``: C headers. ``docs``: read-me files and package descriptions. ``perl``:
    Perl modules. ``legal``: licences.

    Example:
        >>> list(default_sources())
        ['python', 'man', 'c', 'docs', 'perl', 'legal']
    """
    packages = sysconfig.get_path("purelib")
    everywhere = {
        "python": (f"{sysconfig.get_path('stdlib')}/**/*.py",),
        "man": (
            "/usr/share/man/man[1358]/*.[1358]*",
            "/usr/local/share/man/man[1358]/*.[1358]*",
        ),
        "c": (
            "/usr/include/**/*.h",
            f"{sysconfig.get_path('include')}/**/*.h",
            *(f"{folder}/**/*.h" for folder in _package("numpy")),
        ),
        "docs": (
            *(f"/usr/share/doc/**/{name}" for name in ("README*", "*.md*", "*.rst*")),
            f"{packages}/*.dist-info/METADATA",
        ),
        "perl": ("/usr/share/perl/**/*.pm", "/usr/lib/*/perl*/**/*.pm"),
        "legal": (
            "/usr/share/common-licenses/*",
            "/usr/share/doc/*/copyright",
            f"{packages}/*.dist-info/**/LICENSE*",
        ),
    }
    # Tests and tables of code points are not what anyone writes.
    exclude = {
        "python": (
            *("*/site-packages/*", "*/dist-packages/*", "*/__pycache__/*"),
            *("*/test/*", "*/tests/*", "*/idle_test/*", "*/encodings/*"),
        ),
        "perl": ("*/unicore/*",),
        "docs": ("*.html*", "*.pdf*", "*.mo", "*.png"),
    }
    return {
        name: TextSource(
            name=name, patterns=patterns, exclude=exclude.get(name, ()), strict=False
        )
        for name, patterns in everywhere.items()
    }


def available_sources(count: int, *, min_files: int = 40) -> list[TextSource]:
    """The first ``count`` default domains of which this machine holds enough files.

    Raises:
        FileNotFoundError: if there are fewer; the text lists what was looked for.

    Example:
        >>> available_sources(1, min_files=10)[0].name  # every Python has a standard library
        'python'
    """
    found, missed = [], []
    for source in default_sources().values():
        enough = 0
        for pattern in source.patterns:
            for _ in glob.iglob(pattern, recursive=True):
                enough += 1
                if enough >= min_files:
                    break
        (found if enough >= min_files else missed).append((source, enough))
        if len(found) == count:
            return [source for source, _ in found]
    looked = "".join(
        f"\n  {source.name} ({number} files): {', '.join(source.patterns)}"
        for source, number in missed
    )
    raise FileNotFoundError(
        f"{count} domains were asked for and {len(found)} found among the text of this "
        f"machine ({', '.join(s.name for s, _ in found) or 'none'}); at least {min_files} "
        f"files each were looked for in:{looked}\nGive folders with name=path"
    )


def parse_sources(texts: Sequence[str]) -> list[TextSource]:
    """Domains as a person writes them.

    Args:
        texts: ``name=path`` (a file, a folder or a glob; the same name again adds to it),
            or the name of a default domain.

    Returns:
        One source per domain, in the order of their first mention.

    Raises:
        FileNotFoundError: for a path without files.
        ValueError: for an unknown name, or a path without a name.

    Example:
        >>> [source.name for source in parse_sources(["python", "man"])]
        ['python', 'man']
    """
    known = default_sources()
    sources: dict[str, TextSource] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if separator and (not name or not path or "/" in name):
            raise ValueError(
                f"{text!r}; a domain is written name=path, as in law=texts/law"
            )
        if not separator:
            if name not in known:
                raise ValueError(_unknown(name, known))
            sources[name] = known[name]
            continue
        path = os.path.expanduser(path)
        exists = pathlib.Path(path).exists()
        if not exists and not (glob.has_magic(path) and _any(path)):
            raise FileNotFoundError(
                f"domain {name!r}: no file or folder {path}, and as a glob it finds "
                f"nothing (working directory {pathlib.Path.cwd()})"
            )
        before = sources[name].patterns if name in sources else ()
        sources[name] = TextSource(name=name, patterns=(*before, path))
    return list(sources.values())


def _unknown(name: str, known: dict[str, TextSource]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return (
        f"unknown domain {name!r}{hint} Known: {', '.join(known)}; own text is given as "
        f"name=path, as in {pathlib.Path(name).stem or 'mine'}={name or 'texts'}"
    )


def _any(pattern: str) -> bool:
    return next(glob.iglob(pattern, recursive=True), None) is not None


def _package(name: str) -> list[str]:
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or ()) if spec else []
