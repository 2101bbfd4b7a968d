"""This module writes compare.json, compare.md and report.html, a page that fetches nothing.

All markup is in two templates, `compare.md.j2` and `report.html.j2`. Every text that goes into them
is escaped; only the figures that plotly draws are HTML already."""

import re
import sys
from pathlib import Path
from typing import Any

from .. import records
from ..job.shown import without_controls
from ..records import Comparison
from ..records.steps import shorten_all
from ..records.whole import remove_parts, write_whole
from .clean import clean
from .costs import join_best, tell_best, tell_sharing
from .excuses import format_excused
from .formats import format_value
from .overview import tell_job, tell_tool
from .plots import bars, curves
from .precision import compare_precision
from .receipts import tell_receipt
from .resumed import tell_source
from .standing import Standing, standings, trusted_runs
from .table import FLUSH_LEFT, build_rows, describe_memory, make_headers, make_legend
from .verdict import LONGEST, verdict

NO_CURVES = "its curves need plotly, which is not installed: pip install hybrid[report]"


def write(comparison: Comparison, out: Path) -> list[Path]:
    """Write compare.json, compare.md and report.html into `out`, and return their paths.

    All are put together before the first is written, and each is written whole: compare.json comes
    last, so that where it is new, the others are. Where plotly is missing the page says so in the
    place of its curves, and so does a warning."""
    texts = {
        out / "compare.md": markdown(comparison),
        out / "report.html": html(comparison),
        out / "compare.json": records.dumps(shorten_all(comparison)) + "\n",
    }
    out.mkdir(parents=True, exist_ok=True)
    remove_parts(*texts, out / "session.json")  # of killed comparisons
    for path, text in texts.items():
        write_whole(path, text)
    return [out / "compare.json", out / "compare.md", out / "report.html"]


def markdown(comparison: Comparison) -> str:
    """Return the text of compare.md."""
    return _render("compare.md.j2", _describe(clean(comparison)), finalize=_escape_markdown)


def html(comparison: Comparison) -> str:
    """Return the text of report.html, whose curves need plotly."""
    comparison = clean(comparison)
    memories = [run.memory for run in trusted_runs(comparison).values() if run.memory]
    values = {
        **_describe(comparison),
        "best": tell_best(comparison),
        "sharing": tell_sharing(comparison),
        "precision": compare_precision(comparison),
        "runs": [_describe_run(comparison, *found) for found in standings(comparison).items()],
        "instruments": sorted({memory.how for memory in memories}),
        "curves": _draw(comparison),  # None without plotly
        "no_curves": NO_CURVES,
        "bars": bars(comparison),
        "job": comparison.job,
        "machine": comparison.machine,
    }
    return _render("report.html.j2", values, autoescape=True, finalize=_show)


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
    return re.sub(marks, r"\\\1", " ".join(without_controls(text).split()))


def _show(value: Any) -> Any:
    """Escape control characters in a text of the page, but not in what is HTML already."""
    return without_controls(value) if type(value) is str else value


def _describe(comparison: Comparison) -> dict[str, Any]:
    """Return what compare.md and the top of report.html tell, as plain data without markup."""
    return {
        "verdict": verdict(comparison),
        "overview": [tell_job(comparison), tell_tool(comparison)],
        "summary": " ".join(filter(None, [join_best(comparison), tell_sharing(comparison)])),
        "headers": make_headers(comparison),
        "flush_left": FLUSH_LEFT,
        "rows": list(build_rows(comparison).values()),
        "legend": make_legend(comparison),
    }


def _describe_run(comparison: Comparison, name: str, standing: Standing) -> dict[str, Any]:
    """Return the standing of a run, its receipt and, where it may be shown, its memory."""
    record, parity = comparison.strategies[name], comparison.parity.get(name)
    evidence = record.receipt.evidence if record.receipt else None
    machine, environment = comparison.machine, record.environment
    own = {key: value for key, value in environment.items() if machine.get(key) != value}
    whole = standing.problem
    return {
        "name": name,
        "state": standing.state,
        "trusted": not standing.reason,
        "cut": whole if len(" ".join(whole.split())) > LONGEST else "",
        "sentences": [*tell_source(name, record), *tell_receipt(evidence or {})],
        "evidence": evidence and {k: v for k, v in evidence.items() if k != "precision"},
        "environment": own,
        "excused": dict(enumerate(map(format_excused, parity.excused), 1)) if parity else {},
        "memory": {} if standing.reason else describe_memory(record),
    }


def _draw(comparison: Comparison) -> list[dict[str, str]] | None:
    """Draw each figure as HTML; the first brings plotly's JavaScript, so that none is fetched."""
    try:
        from plotly.io import to_html
    except ModuleNotFoundError:
        print(f"hybrid: warning: report.html: {NO_CURVES}", file=sys.stderr)
        return None
    fixed: Any = {"full_html": False, "config": {"responsive": True, "displayModeBar": False}}
    drawn = []
    for n, (title, figure) in enumerate(curves(comparison)):
        fragment = to_html(figure, **fixed, include_plotlyjs=n == 0, div_id=f"curves-{n}")
        drawn.append({"title": title, "html": fragment})
    return drawn
