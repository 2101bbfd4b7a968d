"""README.md and the pages in docs/ in pieces: code blocks, tables, sections, links.

A code block with a file's name in the line above it, in backticks and with a colon, is that file. A
name with a folder is a file of the checkout. A name without one is a file that the commands of all
documents find in the folder where they run.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block: the page it is in, the fence's word, the file that it is, what it holds."""

    page: str
    language: str
    file: str | None
    text: str


def blocks(pages: list[Path]) -> list[Block]:
    """All fenced blocks of some pages, in order; a block in a list without its indentation."""
    found = []
    for page in pages:
        pattern = r"^(?:`([\w./-]+)`:\n\n)?( *)```(.*)\n((?s:.*?))^\2```$"
        for file, _, language, text in re.findall(pattern, page.read_text(), re.M):
            found.append(Block(page.name, language, file or None, textwrap.dedent(text)))
    return found


BLOCKS = blocks(DOCUMENTS)
FILES = {block.file: block.text for block in BLOCKS if block.file and "/" not in block.file}


def of_language(language: str) -> list[Block]:
    """The blocks of README.md and docs/ in one language."""
    return [block for block in BLOCKS if block.language == language]


def commands(pages: list[Path]) -> list[str]:
    """The lines of the pages' blocks of commands, each once, in order."""
    lines = [b.text.splitlines() for b in blocks(pages) if b.language == "bash"]
    return list(dict.fromkeys(line for found in lines for line in found))


def write_files(folder: Path) -> None:
    """Put what the commands of the documents need into a folder."""
    (folder / "launch").symlink_to(ROOT / "launch")
    for name, text in FILES.items():
        (folder / name).write_text(text)


def page_text(name: str) -> str:
    """One document, by its path in the checkout."""
    return (ROOT / name).read_text()


def section(text: str, title: str) -> str:
    """A text below a heading, up to the next of the same level or a higher one."""
    plain = re.sub(r"^```.*?^```$", lambda block: " " * len(block[0]), text, flags=re.M | re.S)
    (start,) = re.finditer(rf"^(#+) {re.escape(title)}\n", plain, re.M)
    end = re.search(rf"^#{{1,{len(start[1])}}} ", plain[start.end() :], re.M)
    return text[start.end() :][: end.start() if end else None]


def rows(text: str) -> list[list[str]]:
    """Cells of the tables in a text, headers too."""
    lines = re.findall(r"^\|(.*)\|$", text, re.M)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in cells if not set(row[-1]) <= set("-:")]


def first_cells(text: str) -> list[str]:
    """What stands in backticks at the start of each row of a table."""
    return re.findall(r"^\| `([^`]+)`", text, re.M)


def spans(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def flat(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def links(text: str) -> list[str]:
    """Where the links and pictures of a text lead."""
    return re.findall(r"\]\(([^)]+)\)", text)
