"""Notebooks and pages: no outputs, badges and devices in place, imports that exist."""

import ast
import importlib
import json
import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
PAGES = [*sorted((DOCS / "methods").glob("*.md")), DOCS / "migration.md"]
PAGES += sorted((DOCS / "guides").glob("*.md"))
BADGE = "https://colab.research.google.com/github/{}/blob/main/docs/tutorials/{}.ipynb"
REPOSITORY = re.compile(r"colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob")


def cells(path, kind):
    notebook = json.loads(path.read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def test_the_four_notebooks_are_there_and_in_the_index():
    index = (DOCS / "index.md").read_text()
    assert len(NOTEBOOKS) >= 4
    for path in NOTEBOOKS:
        assert f"tutorials/{path.stem}\n" in index, path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_output(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab_and_shows_its_devices(path):
    title = cells(path, "markdown")[0]
    repositories = {
        REPOSITORY.search(cells(p, "markdown")[0]).group(1) for p in NOTEBOOKS
    }
    assert len(repositories) == 1
    assert BADGE.format(*repositories, path.stem) in title
    assert any("jax.devices()" in code for code in cells(path, "code"))
    assert any("GPU or TPU" in text for text in cells(path, "markdown"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_page_imports_exists(path):
    """Blocks that are not executed name real modules and names all the same."""
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom):
                continue
            if not (node.module or "").startswith("emfuse_jax"):
                continue
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{path.name}: {alias.name}"


def test_every_method_page_has_its_parts():
    """Equations, where they come from, what limits it, and results."""
    for path in PAGES:
        if path.parent.name != "methods" or path.stem == "index":
            continue
        text = path.read_text()
        assert "$$" in text, path
        for heading in ("Source", "Limits", "Results"):
            assert re.search(rf"^## {heading}s?$", text, re.M), f"{path}: {heading}"
