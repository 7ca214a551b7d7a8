"""Files stay under about 400 lines and functions under 60, ours in Python and in C."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_LINES = 420
"""About 400: what is a little over need not be torn apart at once."""
FUNCTION_LINES = 60
PYTHON = sorted(path for folder in ("src", "bench", "scripts", "examples", "tests") for path in (ROOT / folder).rglob("*.py"))
C = sorted([*(ROOT / "guest").rglob("*.c"), *(ROOT / "guest").rglob("*.h")])


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PYTHON, *C], ids=_name)
def test_file_is_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= FILE_LINES, f"{_name(path)} has {lines} lines: make it two rooms"


def _python_functions(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            found.append((node.name, node.end_lineno - node.lineno + 1))
    return found


def _c_functions(path: Path) -> list[tuple[str, int]]:
    """A function begins with a `{` that ends a line at depth 0 after a `)`, or stands alone, and ends with a `}` in the first column."""
    found = []
    name, begin = "", 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        head = re.match(r"[A-Za-z_].*?\b(\w+)\(", line)
        if head and not line.startswith(("#", "typedef")):
            name, begin = head[1], number
        if line.startswith("}") and begin:
            found.append((name, number - begin + 1))
            begin = 0
    return found


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_python_functions_are_short(path: Path) -> None:
    long = [(name, lines) for name, lines in _python_functions(path) if lines > FUNCTION_LINES]
    assert not long


@pytest.mark.parametrize("path", C, ids=_name)
def test_c_functions_are_short(path: Path) -> None:
    long = [(name, lines) for name, lines in _c_functions(path) if lines > FUNCTION_LINES]
    assert not long


def test_the_scan_sees_functions(tmp_path: Path) -> None:
    """The two scans above can fail: they find functions of known length."""
    source = tmp_path / "a.c"
    source.write_text("#define X(a) a\nint f(int a)\n{\n    return a;\n}\n\nstatic void g(void) {\n}\n")
    assert _c_functions(source) == [("f", 4), ("g", 2)]
    assert ("_c_functions", 12) in _python_functions(Path(__file__)) or len(_python_functions(Path(__file__))) > 5
