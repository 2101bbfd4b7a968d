"""The forms in text: compare.md, and the short table for a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybrid.records import Comparison, Record
from hybrid.report.formats import format_perplexity, format_value
from hybrid.report.precision import compare_precision
from hybrid.report.table import IDENTITY, build_rows, describe_memory, make_headers, make_legend
from hybrid.report.verdict import judge, verdict

if TYPE_CHECKING:
    from rich.table import Table


def markdown(comparison: Comparison) -> str:
    """What compare.md holds."""
    said, runs = verdict(comparison), comparison.strategies
    headers = make_headers(comparison)
    cells = [[_escape(cell) for cell in row] for row in build_rows(comparison).values()]
    receipts = {
        name: format_value(run.receipt.evidence) if run.receipt else "no receipt"
        for name, run in runs.items()
    }
    facts = {"job": comparison.job, "machine": comparison.machine}
    return "\n".join(
        [
            " ".join([f"**{_escape(said.headline)}**", *map(_escape, said.details)]),
            *("", *_table(headers, ["---" if h in IDENTITY else "---:" for h in headers], cells)),
            *("", _escape(make_legend(comparison))),
            *_precision(comparison),
            *_validation(comparison),
            *_memory(comparison),
            *("", "## What ran, read off the live objects", "", *_bullets(receipts)),
            *("", "## Job and machine", ""),
            *_bullets({key: format_value(value) for key, value in facts.items()}),
            *("", "Exact values: compare.json.", ""),
        ]
    )


def _table(headers: Sequence[str], rules: list[str], cells: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (headers, rules, *cells)]


def _precision(comparison: Comparison) -> list[str]:
    """The ledgers, bold where the reference has another."""
    found = compare_precision(comparison)
    if found is None:
        return []
    lines = ["", "## Precision", "", _escape(" ".join(found.sentences))]
    if found.rows:
        cells = [
            [
                _escape(name),
                *(f"**{_escape(c.text)}**" if c.differs else _escape(c.text) for c in row),
            ]
            for name, row in found.rows.items()
        ]
        heads = [_escape(head) for head in found.headers]
        lines += ["", *_table(heads, ["---"] * len(heads), cells)]
    return lines


def _validation(comparison: Comparison) -> list[str]:
    told = [f"- **{_escape(n)}**: {text}" for n, text in _evaluated(comparison).items()]
    return ["", "## Validation loss", "", *told] if told else []


def _evaluated(comparison: Comparison) -> dict[str, str]:
    """From the first evaluation to the last, of each run that may be believed."""
    runs = {n: comparison.strategies[n] for n, run in judge(comparison).items() if not run.problem}
    return {n: _progress(run) for n, run in runs.items() if len(run.evals) > 1}


def _progress(run: Record) -> str:
    first, last = run.evals[0], run.evals[-1]
    text = f"validation loss {first.result.loss:#.5g} -> {last.result.loss:#.5g}"
    a, b = first.result.perplexity, last.result.perplexity
    if a is not None and b is not None:
        text += f", perplexity {format_perplexity(a)} -> {format_perplexity(b)}"
    return f"{text}, after {first.step} and {last.step} steps"


def _memory(comparison: Comparison) -> list[str]:
    found = {
        name: format_value(peaks)
        for name, run in judge(comparison).items()
        if not run.problem and (peaks := describe_memory(comparison.strategies[name]))
    }
    return ["", "## Peak memory of each rank", "", *_bullets(found)] if found else []


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
    below = [*said.details, *(f"{n}: {text}." for n, text in _evaluated(comparison).items())]
    caption = Text("\n".join(below))
    table = Table(title=title, caption=caption, title_justify="left", box=None)
    table.caption_justify = "left"
    headers = make_headers(comparison)
    shown = [n for n, head in enumerate(headers) if head not in LEFT_TO_THE_FILES]
    for n in shown:
        left = headers[n] in IDENTITY
        table.add_column(headers[n], justify="left" if left else "right", overflow="fold")
    for row in build_rows(comparison).values():
        table.add_row(*(Text(row[n]) for n in shown))
    return table
