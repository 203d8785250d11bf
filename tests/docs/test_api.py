"""Everything public has a docstring, a place on the API pages, and an example that runs.

Public is what a module's ``__all__`` says, or where it says nothing, every class and
function of its own without a leading underscore.
"""

import contextlib
import doctest
import fnmatch
import importlib
import importlib.util
import inspect
import io
import pathlib
import tomllib
import types

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXEMPT = tomllib.loads(pathlib.Path(__file__).with_name("exemptions.toml").read_text())
NO_DOCSTRING = EXEMPT["docstrings"]
NO_EXAMPLE = {
    name: reason
    for reason, group in EXEMPT["examples"].items()
    for name in group["names"]
}


def _generator():
    path = ROOT / "docs" / "generate_api.py"
    spec = importlib.util.spec_from_file_location("generate_api", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api = _generator()
MODULES = api.public_modules("emfuse_jax")


def is_code(value):
    return inspect.isclass(value) or inspect.isfunction(value)


def public_values():
    """``{(module, name): value}`` of every public name, by the module that exports it."""
    return {
        (module, name): getattr(importlib.import_module(module), name)
        for module in MODULES
        for name in api.exported(module)
    }


def has_docstring(value):
    """A text of its own: a NamedTuple or dataclass writes its signature by itself."""
    text = inspect.getdoc(value) or ""
    generated = inspect.isclass(value) and text.startswith(f"{value.__name__}(")
    return bool(text) and not generated


def documented(module, name, value):
    """Whether autodoc shows a class or function: where it was defined, or in a module
    (not a package, whose page shows only its docstring) whose ``__all__`` names it."""
    exporter = importlib.import_module(module)
    if hasattr(exporter, "__all__") and not hasattr(exporter, "__path__"):
        return True
    if id(value) in api.shown_by_a_module(module):
        return True
    home = value.__module__
    listed = api.exported(home) if home in MODULES else []
    return value.__name__ in listed or (home in MODULES and not is_code(value))


def constants_of(module):
    """Documented constants of a module and of the public modules below it."""
    below = [m for m in MODULES if m == module or m.startswith(f"{module}.")]
    public = {name for home in below for name in api.documented_constants(home)}
    return public | set(api.private_constants(module))


VALUES = public_values()
FUNCTIONS = {
    f"{value.__module__}.{value.__name__}": value
    for value in VALUES.values()
    if inspect.isfunction(value) and value.__module__.startswith("emfuse_jax")
}


def test_every_module_is_looked_at():
    assert len(MODULES) > 60
    assert len(VALUES) > 400


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_a_docstring(module):
    missing = [
        name
        for (home, name), value in VALUES.items()
        if home == module
        and is_code(value)
        and not has_docstring(value)
        and f"{value.__module__}.{name}" not in NO_DOCSTRING
    ]
    assert not missing, f"{module}: {missing} say nothing; write a docstring"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_on_the_api_pages(module):
    brought_out = set(api.from_private(module))
    missing = []
    for (home, name), value in VALUES.items():
        if home != module or inspect.ismodule(value) or name in brought_out:
            continue
        if is_code(value) or hasattr(value, "__wrapped__"):
            shown = documented(module, name, value)
        else:
            shown = name in constants_of(module)
        if not shown and f"{module}.{name}" not in NO_DOCSTRING:
            missing.append(name)
    assert not missing, f"{module}: {missing} are on no API page"


def test_the_page_of_a_package_shows_what_only_its_private_modules_define():
    text = api.page(api.public_modules("emfuse_jax.parallel"))
    assert ".. py:data:: emfuse_jax.parallel.ROW_KEY" in text
    assert "emfuse_jax.parallel._rows" not in text


def has_example(function):
    lines = (inspect.getdoc(function) or "").splitlines()
    return any(">>>" in line and "+SKIP" not in line for line in lines)


def covers(pattern, name):
    return fnmatch.fnmatchcase(name, pattern)


def test_public_functions_have_an_example_that_runs():
    """The examples themselves run in tests/architecture."""
    without = [name for name, f in FUNCTIONS.items() if not has_example(f)]
    missing = [n for n in without if not any(covers(p, n) for p in NO_EXAMPLE)]
    assert not missing, f"no doctest, and no reason given for that: {missing}"


def test_the_runner_finds_every_example():
    """It takes what `doctest` finds in a module, functions behind a decorator too."""
    homes = {f.__module__ for f in FUNCTIONS.values()}
    finder = doctest.DocTestFinder()
    found = {
        example.name
        for home in homes
        for example in finder.find(importlib.import_module(home))
        if example.examples
    }
    missed = {n for n, f in FUNCTIONS.items() if has_example(f)} - found
    assert not missed, sorted(missed)
    assert len(found) > 350


def test_a_wrong_example_fails():
    module = types.ModuleType("wrong")
    module.__doc__ = ">>> 1 + 1\n3\n"
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent):
        assert doctest.testmod(module).failed == 1


@pytest.mark.parametrize("pattern", NO_EXAMPLE)
def test_an_exemption_from_examples_is_needed(pattern):
    covered = [name for name in FUNCTIONS if covers(pattern, name)]
    assert covered, f"there is no public function {pattern}"
    assert any(not has_example(FUNCTIONS[name]) for name in covered), pattern


@pytest.mark.parametrize("name", NO_DOCSTRING)
def test_an_exemption_from_docstrings_is_needed(name):
    module, _, own = name.rpartition(".")
    value = getattr(importlib.import_module(module), own)
    assert not is_code(value) or not has_docstring(value), name


def test_the_checks_can_fail():
    def bare():
        pass

    class Row(tuple):
        """Row(a, b)"""

    assert not has_docstring(bare)
    assert not has_docstring(Row)
    assert not has_example(bare)
