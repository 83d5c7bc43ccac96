"""tests/guards.md and the tests it names belong together."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.findall(
    r"`((?:tests|plugins)/[\w/]+\.py)::(\w+)`", (ROOT / "tests" / "guards.md").read_text(encoding="utf-8")
)


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_guarantee_names_a_test_that_exists() -> None:
    assert len(NAMED) > 70
    assert [f"{file}::{name}" for file, name in NAMED if name not in names_in(ROOT / file)] == []


def test_every_row_names_one() -> None:
    rows = [line for line in (ROOT / "tests" / "guards.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [row for row in rows if not row.startswith(("| what", "|---"))]
    assert len(rows) == len(NAMED) and all(row.count("|") == 4 for row in rows)


def test_every_guard_is_on_the_page() -> None:
    files = [path for path in sorted((ROOT / "tests").glob("test_guards_*.py"))]
    written = {(f"tests/{path.name}", name) for path in files for name in names_in(path)}
    assert len(files) > 4 and sorted(written - set(NAMED)) == []
