"""What a person who mistyped a name probably meant."""

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Iterator

from emfuse_jax.artifacts.config import nearest
from experiments._methods import OFFLINE


@contextlib.contextmanager
def meant(name: str, known: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Where the body refuses ``name``, and it is none of ``known()``, the nearest one is
    added to what the error says."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        names = list(known())
        near = None if name in names else nearest(name, names)
        if near is None:
            raise
        text = str(error).rstrip(".")
        raise type(error)(f"{text}. Did you mean {near!r}?") from error


def environments() -> list[str]:
    """Those that can be simulated here."""
    from emfuse_jax.envs.mujoco_table import ENVIRONMENTS
    from emfuse_jax.envs.pointmaze import MAZES

    return [*ENVIRONMENTS, *MAZES]


def environment(name: str) -> contextlib.AbstractContextManager[None]:
    """`meant` one of `environments`."""
    return meant(name, environments)


def behaviour(name: str) -> contextlib.AbstractContextManager[None]:
    """`meant` a packaged policy."""
    from emfuse_jax.data.behaviour import packaged_behaviours

    return meant(name, lambda: [*packaged_behaviours(), "random"])


def run(path: str | pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """`meant` a run directory beside that place."""

    def known() -> list[str]:
        beside = pathlib.Path(path).parent.glob("*/config.json")
        return [str(file.parent) for file in beside]

    return meant(str(path), known)


def data_set(source: str) -> contextlib.AbstractContextManager[None]:
    """`meant` an HDF5 file beside that place, or one of Minari's that is here."""

    def known() -> list[str]:
        path = pathlib.Path(source)
        files = [str(p) for p in path.parent.glob("*") if p.suffix in (".hdf5", ".h5")]
        try:
            from emfuse_jax.data.minari_reader import local_datasets

            return [*files, *local_datasets()]
        except ImportError:
            return files

    return meant(source, known)


def unknown_flag(name: str, known: Iterable[str]) -> str:
    """The text of an error about a flag; a part of a dotted name finds the whole.

    Example:
        >>> unknown_flag("learning_rat", ["seed", "etm.learning_rate"])
        'unknown flag --learning_rat. Did you mean --etm.learning_rate? --help lists all'
    """
    known = sorted(known)
    lasts = [flag.rpartition(".")[2] for flag in known]
    last = nearest(name.rpartition(".")[2], lasts)
    whole = nearest(name, known) if "." in name or last is None else None
    near = [f for f, part in zip(known, lasts, strict=True) if part == last]
    near = [whole] if whole else near
    told = ", ".join(f"--{flag}" for flag in near[:4])
    hint = f" Did you mean {told}?" if near else ""
    method, dot, _ = name.partition(".")
    if dot and method in OFFLINE and not any(f.startswith(f"{method}.") for f in known):
        hint = f" It belongs to train_policy --method={method}."
    return f"unknown flag --{name}.{hint} --help lists all"
