"""Notebooks and pages: no outputs, badges and devices in place, imports that exist."""

import ast
import importlib
import json
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import pytest

from emfuse_jax import llm
from experiments import list as catalogue

DOCS = pathlib.Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
PAGES = [*sorted((DOCS / "methods").glob("*.md")), DOCS / "migration.md"]
BADGE = "https://colab.research.google.com/github/{}/blob/main/docs/tutorials/{}.ipynb"
NAMING = runpy.run_path(str(DOCS / "repository.py"))
REPOSITORY = NAMING["REPOSITORY"]


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
    assert BADGE.format(REPOSITORY, path.stem) in cells(path, "markdown")[0]
    assert f'git+https://github.com/{REPOSITORY}"' in cells(path, "code")[0]
    assert any("jax.devices()" in code for code in cells(path, "code"))
    assert any("GPU or TPU" in text for text in cells(path, "markdown"))


def test_the_repository_is_named_in_one_place():
    """`repository.py` rewrites every name of it that a notebook spells out."""
    for path in NOTEBOOKS:
        text = path.read_text()
        assert NAMING["renamed"](text) == text
        moved = text.replace(REPOSITORY, "some-body/else.where")
        assert moved.count("some-body/else.where") == 2
        assert NAMING["renamed"](moved) == text


def blocks(path):
    """The Python of a page that the build does not execute."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


@pytest.mark.allow_rank_promotion  # blackjax does
def test_the_examples_of_the_migration_page_run(tmp_path, monkeypatch):
    """On two bowls, and on two folders of tiny language models."""
    sampling, packing = blocks(DOCS / "migration.md")
    bowls = {"energy_a": lambda y: jnp.sum(y**2), "energy_b": lambda y: jnp.sum(y**4)}
    space = {"weights": jnp.array([0.5, 0.5]), "ones": jnp.ones(2), **bowls}
    exec(sampling, space)
    start = space["algorithm"].init(jnp.ones(2))
    assert float(start.logdensity) == pytest.approx(-2.0)

    config = llm.LmConfig(vocab_size=257, hidden_size=8, num_layers=1, num_heads=1)
    params = llm.init_params(jax.random.key(0), config)
    for folder in "AB":
        llm.save_pretrained(tmp_path / folder, params, config)
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(packing, space)
    assert space["fused"].vocab_size == 257
    assert len(space["params"]) == 2


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_page_imports_exists(path):
    """Blocks that are not executed name real modules and names all the same."""
    for block in blocks(path):
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


@pytest.mark.parametrize("kind", ["rules", "models", "fusions", "methods", "merges"])
def test_every_name_of_a_method_leads_to_a_page(kind):
    """A row of the index names it and links a page that is there and in the menu."""
    index = (DOCS / "methods" / "index.md").read_text()
    menu = index.partition("{toctree}")[2].split()
    pages = {}
    for row in re.findall(r"^\|.*\|$", index, re.M):
        for link in re.findall(r"\]\((\w+)\.md\)", row):
            assert link in menu
            assert (DOCS / "methods" / f"{link}.md").is_file(), link
            pages |= dict.fromkeys(re.findall(r"`(\w+)`", row), link)
    assert set(catalogue.KINDS[kind]()) <= set(pages)
