"""docs/reliability.md names a test for each fault, and each of these tests exists."""

import ast
import re
from functools import cache
from pathlib import Path

from support import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
GROUPS = {
    "Data", "Configuration", "Disk", "Signals", "Numbers", "Ranks", "Files", "Checkpoints",
    "Sweeps",
}  # fmt: skip


def rows_of(page: str) -> list[tuple[str, str, str]]:
    """(fault, what happens, test) of each row of its tables."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if "::" in line]
    return [(fault, happens, test.strip("`")) for fault, happens, test in rows]


def test_each_group_has_faults():
    parts = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
    assert set(parts) == GROUPS
    assert {name for name, part in parts.items() if len(rows_of(part)) < 8} == set()


def test_there_are_at_least_200_distinct_faults():
    faults = [fault for fault, _, _ in rows_of(PAGE)]
    assert len(faults) == len(set(faults)) >= 200
    assert len(faults) == len(re.findall(r"^\| (?!fault|---)", PAGE, re.MULTILINE))


@cache
def functions_of(path: Path) -> set[str]:
    """Names of the functions of a module."""
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_each_names_a_test_that_exists():
    missing = []
    for _, _, name in rows_of(PAGE):
        file, _, function = name.partition("::")
        path = ROOT / file if "/" in file else ROOT / "tests" / file
        if not function.startswith("test_") or function not in functions_of(path):
            missing.append(name)
    assert missing == []
