"""What docs/ says about tests: the tests are there, and the matrix of models has the rows and columns tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def names_of_tests() -> set[str]:
    texts = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    return {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert named <= names_of_tests()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_test_that_a_page_names_with_its_file_is_there(page: Path) -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)", page.read_text())
    missing = [
        f"{file}::{name}"
        for file, name in named
        if f"def {name}(" not in (ROOT / "tests" / file.removeprefix("tests/")).read_text()
    ]
    assert missing == []


def test_the_matrix_of_models_has_the_architectures_and_steps_that_are_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "integrations"))
    from tiny_models import ARCHITECTURES

    source = (ROOT / "tests" / "integrations" / "test_matrix.py").read_text()
    steps = re.findall(r"^def test_(\w+)", source, re.MULTILINE)
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *rows = table[: 2 + len(ARCHITECTURES)]
    assert head[1:] == steps
    assert [row[0] for row in rows] == list(ARCHITECTURES)
    assert {cell for row in rows for cell in row[1:]} == {"yes"}
