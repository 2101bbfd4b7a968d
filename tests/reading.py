"""The page on reading a comparison in pieces, and the texts in the code that it is held against."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.conftest import ROOT

TEXT = (ROOT / "hybrid" / "report" / "README.md").read_text()


def section(title: str) -> str:
    """The page below a heading, up to the next of the same level or a higher one."""
    (start,) = re.finditer(rf"^(#+) {title}\n", TEXT, re.M)
    end = re.search(rf"^#{{1,{len(start[1])}}} ", TEXT[start.end() :], re.M)
    return TEXT[start.end() :][: end.start() if end else None]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables in a text, headers too."""
    lines = re.findall(r"^\|(.*)\|$", text, re.M)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in cells if not set(row[-1]) <= set("-:")]


def spans(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def flat(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def strings(code: ast.AST) -> Iterator[str]:
    """Text constants of some code, without docstrings."""
    docs = {
        node.body[0].value
        for node in ast.walk(code)
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(code):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            yield node.value


SOURCES = [ast.parse(file.read_text()) for file in (ROOT / "hybrid").rglob("*.py")]
PARITY = ast.parse((ROOT / "hybrid" / "parity.py").read_text())
