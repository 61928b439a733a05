"""The support matrix claims nothing that no test holds."""

import ast
import re
from pathlib import Path

import pytest

from tests.families import FAMILIES
from tests.integration.test_tensor_parallel import MODELS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
BY_DECORATOR = {  # of tests/integration/test_families.py
    "families": FAMILIES,
    "compiling_families": [family for family in FAMILIES if family.compiles],
    "adapted_families": [family for family in FAMILIES if family.adapts],
}
COLUMNS = ["family", "quantize", "load", "TP", "LoRA", "compile"]


def rows() -> list[list[str]]:
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| family |"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    assert table[0] == COLUMNS
    return table[2:]


def legend() -> dict[str, str]:
    """Letters, and the tests that they stand for."""
    found = re.findall(r"^- `(\w+)` `(tests/[\w/]+\.py::\w+)`", PAGE, flags=re.MULTILINE)
    assert len(dict(found)) == len(found), "a letter stands for two tests"
    return dict(found)


def function(test: str) -> tuple[ast.FunctionDef, str]:
    """A test's definition, and the source of its file."""
    path, _, name = test.partition("::")
    source = (ROOT / path).read_text(encoding="utf-8")
    tree = ast.parse(source)
    definitions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in definitions, test
    return definitions[name], source


@pytest.mark.parametrize("letter", legend())
def test_every_letter_is_a_test(letter: str) -> None:
    definition, _ = function(legend()[letter])
    assert definition.name.startswith("test_")
    assert any(letter in cell.split() for row in rows() for cell in row[1:])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_cells_name_tests_of_the_family(row: list[str]) -> None:
    family, *cells = row
    assert len(cells) == len(COLUMNS) - 1
    for letter in (letter for cell in cells for letter in cell.split()):
        definition, source = function(legend()[letter])
        if legend()[letter].startswith("tests/integration/test_tensor_parallel.py"):
            assert family in MODELS
            continue
        decorators = {ast.unparse(decorator) for decorator in definition.decorator_list}
        if chosen := decorators & BY_DECORATOR.keys():
            assert family in {f.name for f in BY_DECORATOR[chosen.pop()]}
        else:
            # By its name, or its folder on disk is the tiny Llama's.
            body = "".join([*decorators, ast.get_source_segment(source, definition) or ""])
            assert f'"{family}"' in body or f"'{family}'" in body or family == "Llama"


def test_every_family_has_a_row() -> None:
    names = [row[0] for row in rows()]
    assert len(names) == len(set(names))
    assert {family.name for family in FAMILIES} <= set(names)
