"""Every docstring of the package begins with one sentence on its first line."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.conftest import ROOT

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring in a file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and (found := ast.get_docstring(node)):
            yield node.body[0].lineno, found


def problems(text: str) -> list[int]:
    """Lines of the docstrings whose first line is no whole sentence."""
    return [line for line, found in docstrings(text) if not found.splitlines()[0].endswith(".")]


def test_first_lines_are_whole_sentences() -> None:
    found, total = [], 0
    for file in sorted((ROOT / "hybrid").rglob("*.py")):
        text = file.read_text()
        total += sum(1 for _ in docstrings(text))
        found += [f"{file.relative_to(ROOT)}:{line}" for line in problems(text)]
    assert total > 500 and not found, "\n".join(found)


def test_a_first_line_that_goes_on_is_caught() -> None:
    assert problems('def f():\n    """Returns what the\n    caller asked for."""\n') == [2]
    assert problems('def f():\n    """Returns what the caller asked for."""\n') == []


def test_every_file_says_what_it_is() -> None:
    bare = [
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "hybrid").rglob("*.py")
        if not ast.get_docstring(ast.parse(file.read_text()))
    ]
    assert not bare
