"""Writes one API page per package, from the packages themselves.

    python docs/generate_api.py FOLDER

Every public module is on a page, and so is every name that a package's ``__all__`` brings
out of a private module: nothing public can be left out of the documentation
(``tests/docs/test_api.py`` holds this page to that).
"""

import ast
import importlib
import inspect
import itertools
import pathlib
import pkgutil
import sys
import textwrap

import emfuse_jax

_MODULE = """
.. automodule:: {name}
   :members:
"""
_SUMMARY = """
.. currentmodule:: None
.. autosummary::
   :nosignatures:

{names}
"""


def public_modules(name: str) -> list[str]:
    """A package's name and those of its modules without a leading underscore."""
    module = importlib.import_module(name)
    found = [name]
    for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not child.name.startswith("_"):
            found += public_modules(f"{name}.{child.name}")
    return found


def own_names(name: str) -> list[str]:
    """Public classes and functions that a module defines, in order."""
    module = importlib.import_module(name)
    members = [
        value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == name
    ]
    chosen = getattr(module, "__all__", None)
    return [m.__name__ for m in members if chosen is None or m.__name__ in chosen]


def exported(name: str) -> list[str]:
    """The names that a module declares public: ``__all__``, or else its own."""
    module = importlib.import_module(name)
    return list(getattr(module, "__all__", own_names(name)))


def is_private(name: str) -> bool:
    """Whether a module, or a package around it, begins with an underscore."""
    return any(part.startswith("_") for part in name.split("."))


def shown_by_a_module(name: str) -> set[int]:
    """Ids of what the modules of a package bring out by their ``__all__``: a module's
    page shows all of that, wherever it was defined."""
    modules = [
        (child, importlib.import_module(child)) for child in public_modules(name)
    ]
    return {
        id(getattr(module, own))
        for child, module in modules
        if hasattr(module, "__all__") and not hasattr(module, "__path__")
        for own in exported(child)
    }


def from_private(name: str) -> list[str]:
    """What a package exports of its private modules and no module's page shows."""
    module = importlib.import_module(name)
    values = {key: getattr(module, key) for key in exported(name)}
    shown = shown_by_a_module(name)
    return [
        key
        for key, value in values.items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith(f"{name}.")
        and is_private(value.__module__)
        and id(value) not in shown
    ]


def documented_constants(name: str) -> dict[str, str]:
    """Names that a module assigns, with the text that follows the assignment: what
    autodoc shows of values that have no docstring."""
    module = importlib.import_module(name)
    body = ast.parse(pathlib.Path(module.__file__).read_text()).body
    found = {}
    for node, after in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if text and isinstance(after.value.value, str):
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            found |= dict.fromkeys(names, inspect.cleandoc(after.value.value))
    return found


def private_constants(name: str) -> dict[str, str]:
    """Constants that a package exports of its private modules, and what they mean."""
    module = importlib.import_module(name)
    children = pkgutil.iter_modules(getattr(module, "__path__", []))
    texts = {}
    for child in children:
        if child.name.startswith("_") and not child.ispkg:
            texts |= documented_constants(f"{name}.{child.name}")
    return {key: texts[key] for key in exported(name) if key in texts}


def page(names: list[str]) -> str:
    """The page of one package: its docstring, then each module's."""
    title = names[0]
    text = f"{title}\n{'=' * len(title)}\n\n.. automodule:: {title}\n"
    if len(names) == 1:
        return text + "   :members:\n"
    for own in from_private(title):
        kind = "class" if inspect.isclass(_get(title, own)) else "function"
        text += f"\n.. auto{kind}:: {title}.{own}\n"
    for own, meaning in private_constants(title).items():
        body = textwrap.indent(meaning, "   ")
        text += f"\n.. py:data:: {title}.{own}\n\n{body}\n"
    for name in names[1:]:
        heading = name.removeprefix(title + ".")
        text += f"\n{heading}\n{'-' * len(heading)}\n"
        listed = own_names(name)
        if len(listed) > 1:
            lines = "\n".join(f"   {name}.{own}" for own in listed)
            text += _SUMMARY.format(names=lines)
        text += _MODULE.format(name=name)
    return text


def _get(module: str, name: str) -> object:
    return getattr(importlib.import_module(module), name)


def main(folder: pathlib.Path) -> None:
    """Writes the pages and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    children = [child.name for child in pkgutil.iter_modules(emfuse_jax.__path__)]
    children = [f"emfuse_jax.{child}" for child in children if child[0] != "_"]
    for name in children:
        (folder / f"{name}.rst").write_text(page(public_modules(name)))
    entries = "\n".join(f"   {name}" for name in children)
    title = "API"
    text = (
        f"{title}\n{'=' * len(title)}\n\n.. toctree::\n   :maxdepth: 1\n\n{entries}\n"
    )
    (folder / "index.rst").write_text(text)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
