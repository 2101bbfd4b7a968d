"""This module writes compare.json, compare.md and report.html, a page that fetches nothing.

All markup is in two templates, `compare.md.j2` and `report.html.j2`. Every text that goes into them
is escaped; only the figures that plotly draws are HTML already."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import records
from ..records import Comparison
from .formats import format_value
from .plots import Curves, bars, curves
from .precision import compare_precision
from .table import (
    IDENTITY,
    build_rows,
    describe_memory,
    find_meaning,
    make_headers,
    make_legend,
    tell_progress,
)
from .verdict import Standing, format_excused, standings, trusted_runs, verdict


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Write compare.json, compare.md and report.html into `out`, and return their paths.

    The page comes last, so that the other two are there where plotly is missing."""
    paths = [out / "compare.json", out / "compare.md", out / "report.html"]
    records.write(comparison, paths[0])
    paths[1].write_text(markdown(comparison), encoding="utf-8")
    paths[2].write_text(html(comparison), encoding="utf-8")
    return paths


def markdown(comparison: Comparison) -> str:
    """Return the text of compare.md."""
    return _render("compare.md.j2", _describe(comparison), finalize=_escape_markdown)


def html(comparison: Comparison) -> str:
    """Return the text of report.html, which needs plotly."""
    memories = [run.memory for run in trusted_runs(comparison).values() if run.memory]
    values = {
        **_describe(comparison),
        "meaning": find_meaning(comparison),
        "instruments": sorted({memory.how for memory in memories}),
        "curves": _draw(curves(comparison)),
        "bars": bars(comparison),
    }
    return _render("report.html.j2", values, autoescape=True)


def _render(template: str, values: dict[str, Any], **escaping: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **escaping,
    )
    environment.filters["on_one_line"] = format_value
    return environment.get_template(template).render(values)


def _escape_markdown(text: str) -> str:
    """Put `text` on one line and escape what Markdown or HTML reads as markup, except '->'."""
    marks = r"([\\`*|<&\[\]~]|(?<!-)>|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))"
    return re.sub(marks, r"\\\1", " ".join(text.split()))


def _describe(comparison: Comparison) -> dict[str, Any]:
    """Return what compare.md and report.html both tell, as plain data without markup."""
    return {
        "verdict": verdict(comparison),
        "headers": make_headers(comparison),
        "flush_left": IDENTITY,
        "rows": list(build_rows(comparison).values()),
        "legend": make_legend(comparison),
        "precision": compare_precision(comparison),
        "progress": tell_progress(comparison),
        "runs": [_describe_run(comparison, *found) for found in standings(comparison).items()],
        "job": comparison.job,
        "machine": comparison.machine,
    }


def _describe_run(comparison: Comparison, name: str, standing: Standing) -> dict[str, Any]:
    """Return the standing of a run, its receipt and, where it may be shown, its memory."""
    record, parity = comparison.strategies[name], comparison.parity.get(name)
    return {
        "name": name,
        "state": standing.state,
        "problem": standing.problem,
        "evidence": record.receipt.evidence if record.receipt else None,
        "num_steps": len(record.steps),
        "environment": record.environment,
        "excused": dict(enumerate(map(format_excused, parity.excused), 1)) if parity else {},
        "memory": {} if standing.problem else describe_memory(record),
    }


def _draw(found: Iterable[Curves]) -> list[dict[str, str]]:
    """Draw each figure as HTML; the first brings plotly's JavaScript, so that none is fetched."""
    try:
        from plotly.io import to_html
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "report.html needs plotly, which is not installed: pip install hybrid[report]"
        ) from None
    fixed: Any = {"full_html": False, "config": {"responsive": True, "displayModeBar": False}}
    drawn = []
    for n, (title, figure) in enumerate(found):
        fragment = to_html(figure, **fixed, include_plotlyjs=n == 0, div_id=f"curves-{n}")
        drawn.append({"title": title, "html": fragment})
    return drawn
