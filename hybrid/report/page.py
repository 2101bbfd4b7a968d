"""report.html, one file that fetches nothing, and `write`, which leaves all forms in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from hybrid import records
from hybrid.records import Comparison
from hybrid.report.formats import format_value
from hybrid.report.markdown import markdown
from hybrid.report.plots import Bars, Curves, bars, curves
from hybrid.report.precision import compare_precision
from hybrid.report.table import build_rows, describe_memory, make_headers, make_legend
from hybrid.report.verdict import format_excused, judge, verdict


def write(comparison: Comparison, out: Path) -> list[Path]:
    """compare.json, compare.md and report.html in `out`. The page comes last, so that the other two
    are there where plotly is missing."""
    paths = [out / "compare.json", out / "compare.md", out / "report.html"]
    records.write(comparison, paths[0])
    paths[1].write_text(markdown(comparison), encoding="utf-8")
    paths[2].write_text(html(comparison), encoding="utf-8")
    return paths


def html(comparison: Comparison) -> str:
    """What report.html holds. Needs plotly."""
    said = verdict(comparison)
    tone, mark = ("good", "\N{CHECK MARK}") if said.ok else ("bad", "\N{BALLOT X}")
    return "\n".join(
        [
            f"{HEAD}<title>{escape(said.headline)}</title><style>{STYLE}</style></head><body>",
            f'<header class={tone}><h1><span aria-hidden="true">{mark}</span> ',
            f"{escape(said.headline)}</h1>",
            *(f"<p>{escape(detail)}</p>" for detail in said.details),
            f"</header><main><p class=soft>{escape(_job_line(comparison))}</p>",
            f"<h2>Results and costs</h2>{_results(comparison)}",
            f"<p class=soft>{escape(make_legend(comparison))}</p>{_precision(comparison)}",
            *_draw_curves(curves(comparison)),
            '<div class="plots">',
            *map(_draw_bars, bars(comparison)),
            "</div><h2>Receipts</h2><p class=soft>What really ran, read off the live objects.</p>",
            *(_receipt(comparison, name, *run[:2]) for name, run in judge(comparison).items()),
            "<h2>Job and machine</h2>",
            _fold("Job", _value(comparison.job)),
            _fold("Machine", _value(comparison.machine)),
            f"<p class=soft>Exact values: compare.json.</p></main>{SCRIPT}</body></html>\n",
        ]
    )


def _job_line(comparison: Comparison) -> str:
    job, train = comparison.job, comparison.job["train"]
    names = " / ".join(job[key]["name"] for key in ("model", "data", "optimizer"))
    steps = max((len(run.steps) for run in comparison.strategies.values()), default=0)
    batch = f"global batch {train['global_batch']}, precision {train['precision']}"
    return f"{names}, {batch}, seed {train['seed']}, {steps} optimizer steps"


def _results(comparison: Comparison) -> str:
    body = []
    for row in build_rows(comparison).values():
        name, layout, state, *figures = map(escape, row)
        badge = f'<span class="state {state.replace(" ", "-")}">{state}</span>'
        body.append(f'<tr><th scope="row">{name}</th><td>{layout}</td><td>{badge}</td>')
        body += [f"<td>{text}</td>" for text in figures]
    return _table("Results and costs", make_headers(comparison), "".join(body), "figures")


def _precision(comparison: Comparison) -> str:
    """The ledgers, marked where the reference has another."""
    found = compare_precision(comparison)
    if found is None:
        return ""
    body = []
    for name, row in found.rows.items():
        body.append(f'<tr><th scope="row">{escape(name)}</th>')
        marks = [" class=differs" if cell.differs else "" for cell in row]
        body += [f"<td{m}>{escape(c.text)}</td>" for c, m in zip(row, marks, strict=True)]
    table = _table("Precision", found.headers, "".join(body), "ledgers") if body else ""
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in found.sentences)
    return f"<h2>Precision</h2><div class=soft>{said}</div>{table}"


def _table(label: str, headers: Iterable[str], body: str, kind: str) -> str:
    """One that scrolls sideways where it is wider than the page; `body` is HTML."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headers)
    return (
        f'<div class=scroll role="region" aria-label="{label}" tabindex="0"><table class={kind}>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _draw_curves(found: Iterable[Curves]) -> Iterable[str]:
    """The first figure brings plotly's JavaScript along, so that none is fetched."""
    try:
        from plotly.io import to_html
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "report.html needs plotly, which is not installed: pip install hybrid[report]"
        ) from None
    fixed: Any = {"full_html": False, "config": {"responsive": True, "displayModeBar": False}}
    for n, (title, caption, figure) in enumerate(found):
        drawn = to_html(figure, **fixed, include_plotlyjs=n == 0, div_id=f"curves-{n}")
        yield (
            f"<figure><h2>{escape(title)}</h2>"
            f'<div role="img" aria-label="{escape(title)}">{drawn}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )


def _draw_bars(found: Bars) -> str:
    """Names, bars and figures in three columns. Resting on a piece of a bar tells what it is."""
    lines = [line for _, lines in found.rows.values() for line in lines]
    longest = max(sum(length for _, length, _ in line) for line in lines) or 1
    body = []
    for name, (text, lines) in found.rows.items():
        body.append(f"<span>{escape(name)}</span><div class=lines>")
        for line in lines:
            pieces = [
                f'<i title="{escape(what)}" style="width:{100 * length / longest:.2f}%;'
                f'background:{colour}"></i>'
                for what, length, colour in line
            ]
            body.append(f"<div>{''.join(pieces)}</div>")
        body.append(f"</div><span class=num>{escape(text)}</span>")
    key = [f'<b style="color:{c}">\u25a0</b>\u00a0{escape(k)} ' for k, c in found.key.items()]
    return (
        f"<figure><h2>{escape(found.title)}</h2><div class=bars>{''.join(body)}</div>"
        f"<figcaption>{''.join(key)}<p>{escape(found.caption)}</p></figcaption></figure>"
    )


def _receipt(comparison: Comparison, name: str, state: str, problem: str) -> str:
    """Open where something is wrong. With both figures of everything excused."""
    record, parity = comparison.strategies[name], comparison.parity.get(name)
    shown: dict[str, Any] = record.receipt.evidence if record.receipt else {"receipt": None}
    excused = dict(enumerate(map(format_excused, parity.excused), 1)) if parity else {}
    shown = {**shown, "environment": record.environment, "excused": excused}
    if not problem:
        shown["peak memory of each rank"] = describe_memory(record)
    body = f"<pre>{escape(problem)}</pre>" if problem else ""
    return _fold(f"{name}: {state}", body + _value(shown), " open" if problem else "")


def _fold(title: str, body: str, unfold: str = "") -> str:
    return f"<details{unfold}><summary>{escape(title)}</summary>{body}</details>"


def _value(value: Any) -> str:
    """Keys and values, nested as they are; what holds no keys is one line."""
    if not isinstance(value, Mapping) or not value:
        return escape(format_value(value))
    pairs = (f"<dt>{escape(str(k))}</dt><dd>{_value(v)}</dd>" for k, v in value.items())
    return f"<dl>{''.join(pairs)}</dl>"


# The policy makes "fetches nothing" something that the browser enforces.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">"""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --page: #fff; --line: #d5dae0;
 --good: #116329; --good-bg: #e6f6ea; --bad: #a40e26; --bad-bg: #ffebe9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --soft: #9da7b3; --page: #12161c;
 --line: #363d47; --good: #6fdd8b; --good-bg: #12301c; --bad: #ff9a92; --bad-bg: #3d1416; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
 overflow-wrap: anywhere; }
header, main { max-width: 1240px; margin: 0 auto; padding: 1rem clamp(1rem, 3vw, 2rem); }
header { border-left: 6px solid; margin-top: 1.5rem; }
header p { margin: .25rem 0; color: var(--ink); }
.state { background: var(--line); padding: .1rem .5rem; border-radius: 1rem; font-size: .85rem; }
.good, .equal { color: var(--good); background: var(--good-bg); }
.bad, .not-equal, .failed, .not-proved, .not-compared { color: var(--bad);
 background: var(--bad-bg); }
h1 { font-size: clamp(1.3rem, 1rem + 1.2vw, 1.75rem); line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.soft, figcaption, thead th, dt { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
 white-space: nowrap; }
.num, .figures tr > :nth-child(n+4) { text-align: right; }
.differs { font-weight: 700; color: var(--ink); background: var(--line); }
.soft p { margin: .4rem 0; }
tbody th { position: sticky; left: 0; background: var(--page); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr));
 gap: 0 2.5rem; }
figure { margin: 0; min-width: 0; }
.bars { display: grid; grid-template-columns: minmax(0, max-content) minmax(6rem, 1fr) auto;
 gap: .4rem .75rem; align-items: center; font-size: .9rem; }
.lines { display: flex; flex-direction: column; gap: 1px; min-height: 1.2rem; }
.lines div { display: flex; flex: 1 0 4px; }
figcaption, figcaption p { margin: .4rem 0; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: fit-content(40%) minmax(0, 1fr); gap: .15rem 1rem;
 margin: .4rem 0 .4rem 1rem; }
dd, dd > dl { margin: 0; }
pre { white-space: pre-wrap; margin: .5rem 1rem; font-size: .85rem; }
.js-plotly-plot text { fill: var(--ink) !important; }
.spikeline, .hovertext path { stroke: var(--soft) !important; }
.hoverlayer rect, .hovertext path { fill: var(--page) !important; }
"""

# A plot takes the width it finds, which a scroll bar or a turned telephone changes afterwards.
SCRIPT = """<script>
const follow = new ResizeObserver(seen => seen.forEach(one => Plotly.Plots.resize(one.target)));
document.querySelectorAll(".js-plotly-plot").forEach(plot => follow.observe(plot));
</script>"""
