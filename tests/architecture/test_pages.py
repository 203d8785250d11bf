"""README.md and WORKSPACE.md say nothing that is not so."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ["README.md", "WORKSPACE.md", "Makefile"]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"^make (\w+)|`make (\w+)`", (ROOT / page).read_text()))
    assert {name for pair in named for name in pair if name} <= targets


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    text = (ROOT / page).read_text()
    for module in re.findall(r"-m ((?:experiments|benchmarks)\.\w+)", text):
        assert importlib.util.find_spec(module), f"{page} names {module}"


def test_places_exist():
    text = (ROOT / "WORKSPACE.md").read_text()
    places = set(re.findall(r"^\| `([\w/.*]+)` \|", text, flags=re.MULTILINE))
    run = {"config.json", "provenance.json", "metrics.jsonl", "stages.json"}
    made = {*run, "tensorboard/", "checkpoints/", "runs/"}
    assert len(places - made) >= 5
    for place in places - made:
        assert list(ROOT.glob(place.rstrip("/"))), f"WORKSPACE.md names {place}"


def test_the_readme_example_runs():
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    lines = code.strip().splitlines()
    scope: dict = {}
    exec("\n".join([*lines[:-1], f"result = {lines[-1]}"]), scope)
    # At 0 the first expert is content and the second pulls towards 1, at half weight.
    assert scope["result"].shape == (4, 3)
    assert scope["result"][0, 0] == pytest.approx(0.5 * -1.0 / 0.25)


def test_the_wheel_is_tested_beside_all_that_tests_read():
    """The release copies the tests elsewhere, with the places that they name."""
    script = (ROOT / ".github" / "scripts" / "test_wheel.sh").read_text()
    copied = set(re.findall(r"\$root/([\w.]+)", script))
    for path in (ROOT / "tests").rglob("*.py"):
        if path.relative_to(ROOT).parts[1] in ("architecture", "docs"):
            continue  # these are of the checkout, and stay behind
        for name in re.findall(
            r'(?:ROOT|TESTS\.parent) / "([\w.]+)"', path.read_text()
        ):
            assert name in copied, f"{path} reads {name}"


def test_the_licence_is_the_whole_one():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
