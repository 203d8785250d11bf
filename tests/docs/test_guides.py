"""The guides are pages that the documentation build executes (`test_build.py`)."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
_CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FRONT = "---\nfile_format: mystnb\n"


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_a_guide_has_cells_that_assert_something(path):
    text = path.read_text()
    assert text.startswith(FRONT)
    cells = _CELL.findall(text)
    assert len(cells) >= 3
    assert any("assert" in cell for cell in cells)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_every_block_of_python_in_a_guide_is_a_cell(path):
    assert "```python" not in path.read_text()
