"""The forms in text: compare.md, and the short table for a terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hybrid.records import Comparison
from hybrid.report.verdict import HEADERS, IDENTITY, LEGEND, build_rows, format_value, verdict

if TYPE_CHECKING:
    from rich.table import Table


def markdown(comparison: Comparison) -> str:
    """What compare.md holds."""
    said, runs = verdict(comparison), comparison.strategies
    rules = ["---" if head in IDENTITY else "---:" for head in HEADERS]
    cells = [[_escape(cell) for cell in row] for row in build_rows(comparison).values()]
    receipts = {
        name: format_value(run.receipt.evidence) if run.receipt else "no receipt"
        for name, run in runs.items()
    }
    facts = {"job": comparison.job, "machine": comparison.machine}
    return "\n".join(
        [
            " ".join([f"**{_escape(said.headline)}**", *map(_escape, said.details)]),
            *("", *(f"| {' | '.join(row)} |" for row in [HEADERS, rules, *cells])),
            *("", _escape(LEGEND)),
            *("", "## What ran, read off the live objects", "", *_bullets(receipts)),
            *("", "## Job and machine", ""),
            *_bullets({key: format_value(value) for key, value in facts.items()}),
            *("", "Exact values: compare.json.", ""),
        ]
    )


def _bullets(items: dict[str, str]) -> list[str]:
    return [f"- **{_escape(key)}**: {_escape(value)}" for key, value in items.items()]


def _escape(text: str) -> str:
    """`text` on one line, each character that Markdown or HTML reads as markup taken literally."""
    marks = r"([\\`*|<>&\[\]~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))"
    return re.sub(marks, r"\\\1", " ".join(text.split()))


LEFT_TO_THE_FILES = ("layout", "weight diff", "step ms")  # so that 80 columns are enough


def console_table(comparison: Comparison) -> Table:
    """The short table for a terminal, verdict above and what it rests on below."""
    from rich.table import Table
    from rich.text import Text

    said = verdict(comparison)
    title = Text(said.headline, "bold green" if said.ok else "bold red")
    table = Table(
        title=title, caption=Text("\n".join(said.details)), title_justify="left", box=None
    )
    table.caption_justify = "left"
    shown = [n for n, head in enumerate(HEADERS) if head not in LEFT_TO_THE_FILES]
    for n in shown:
        left = HEADERS[n] in IDENTITY
        table.add_column(HEADERS[n], justify="left" if left else "right", overflow="fold")
    for row in build_rows(comparison).values():
        table.add_row(*(Text(row[n]) for n in shown))
    return table
