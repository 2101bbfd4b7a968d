"""The page on reading a comparison in pieces, and the texts in the code that it is held against."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import Any

from tests import documents
from tests.conftest import ROOT

TEXT = documents.page_text("docs/reading-a-comparison.md")


def section(title: str) -> str:
    """The page below a heading, up to the next of the same level or a higher one."""
    return documents.section(TEXT, title)


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


def parsed(*names: str) -> ast.Module:
    """Files of the package as one module."""
    trees = [ast.parse((ROOT / "hybrid" / name).read_text()) for name in names]
    return ast.Module([statement for tree in trees for statement in tree.body], [])


def find(value: Any, path: Sequence[str]) -> bool:
    """Whether a path leads somewhere in a JSON value; capitals stand for any key or index."""
    if not path:
        return True
    inner = value.values() if isinstance(value, dict) else value
    if path[0].isupper():
        return isinstance(value, (dict, list)) and any(find(v, path[1:]) for v in inner)
    return isinstance(value, dict) and path[0] in value and find(value[path[0]], path[1:])


SOURCES = [ast.parse(file.read_text()) for file in (ROOT / "hybrid").rglob("*.py")]
PARITY = parsed(*(f"comparison/{n}.py" for n in ("differences", "parity", "causes", "doubts")))
