"""This module prepares what report.html draws: curves as dicts in plotly's format, bars as rows.

It does not import plotly. Names in a figure are escaped here, since plotly reads a small HTML of
its own in any text. Texts in `Bars` are plain."""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ..records import Comparison, Parity, Record
from .formats import format_bytes, format_diff
from .table import Meaning, build_rows, find_meaning
from .verdict import standings, trusted_runs

GREY, RED, CLEAR = "#868e99", "#d6453d", "rgba(0,0,0,0)"
# These eight hues work on white and on black. Dashes and symbols help readers who see no colours.
COLOURS = ("#2f7ed8", "#e08a00", "#0f9d76", "#d1549b", "#8a63d2", "#c8501e", "#23a6c4", "#8f9a1c")
DASHES = ("solid", "dash", "dot", "longdash", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up", "triangle-down", "star")

Piece = tuple[str, float, str]  # of a bar: what it is, its length, its colour
Lines = list[list[Piece]]  # bars one below the other, each of pieces laid end to end
Points = Sequence[tuple[float, float]]
Styles = dict[str, dict[str, Any]]


class Curves(NamedTuple):
    """Holds a figure in plotly's format with its heading."""

    title: str
    figure: dict[str, Any]


class Bars(NamedTuple):
    """Holds for each run the figure as text and its bars.

    `key` says what those colours mean that do not stand for a run."""

    title: str
    rows: dict[str, tuple[str, Lines]]
    key: Mapping[str, str]

    @property
    def longest(self) -> float:
        """Return the length of the longest bar, which takes the whole width."""
        bars = [line for _, lines in self.rows.values() for line in lines]
        return max(sum(length for _, length, _ in bar) for bar in bars) or 1


def curves(comparison: Comparison) -> list[Curves]:
    """Return the figures that have points, with the runs that lost parity, to show how."""
    runs, styles = comparison.strategies.items(), _make_styles(comparison)
    dotted = {name: {**style, "mode": "lines+markers"} for name, style in styles.items()}
    losses = {name: [(step.step, step.loss) for step in run.steps] for name, run in runs}
    tested = {n: [(e.step, e.result.loss) for e in r.evals] for n, r in runs if len(r.evals) > 1}
    drifts = {n: [(at["step"], at["max_relative_drift"]) for at in r.drift or []] for n, r in runs}
    found = [
        _draw_lines("Training loss", "loss", losses, styles),
        _draw_differences(comparison, styles),
        _draw_lines("Validation loss", "validation loss", tested, dotted),
        _draw_lines("Drift between ranks", "relative drift", drifts, styles),
    ]
    return [one for one in found if one.figure["data"]]


def bars(comparison: Comparison) -> list[Bars]:
    """Return a chart of each cost that was measured, with the runs whose costs may be shown."""
    runs, styles = trusted_runs(comparison), _make_styles(comparison)
    meaning, table = find_meaning(comparison), build_rows(comparison)
    comms = [run.comm for run in runs.values() if run.comm]
    sent = {op for comm in comms for op, by in comm.by_op.items() if any(by["sent_bytes"])}
    ops = dict(zip(sorted(sent), itertools.cycle(COLOURS), strict=False))
    drawn = {
        name: _draw_costs(run, meaning, styles[name]["line"]["color"], ops)
        for name, run in runs.items()
    }
    charts: list[tuple[str, str, Mapping[str, str]]] = [
        (f"{meaning.unit.capitalize()} per second", f"{meaning.unit}/s", {}),
        ("Peak memory", "peak memory", {}),
        ("Bytes sent a step", "bytes sent", ops),
    ]
    found = [
        Bars(title, {n: (table[n][at], d[at]) for n, d in drawn.items() if at in d}, key)
        for title, at, key in charts
    ]
    return [chart for chart in found if chart.rows]


def _draw_costs(
    run: Record, meaning: Meaning, colour: str, ops: Mapping[str, str]
) -> dict[str, Lines]:
    """Return the bars of a run by the column of the table that has the figure."""
    drawn: dict[str, Lines] = {}
    if run.throughput:
        median = ("median step", meaning.find_rate(run.throughput), colour)
        drawn[f"{meaning.unit}/s"] = [[median]]
    if run.memory:
        peaks = enumerate(meaning.find_peaks(run.memory))
        drawn["peak memory"] = [[(f"rank {n}: {format_bytes(p)}", p, colour)] for n, p in peaks]
    if run.comm:
        rank = run.comm.bytes_per_step.index(max(run.comm.bytes_per_step))
        sent = [(op, by["sent_bytes"][rank]) for op, by in sorted(run.comm.by_op.items())]
        pieces = [(f"{op}: {format_bytes(n)}", n, ops[op]) for op, n in sent if op in ops]
        drawn["bytes sent"] = [pieces]
    return drawn


def _make_styles(comparison: Comparison) -> Styles:
    """Return the name, line and marker of each run; the reference is a broad grey band.

    So the lines that cover the reference leave it in sight."""
    reference, found = comparison.reference, standings(comparison)
    line: dict[str, Any] = {"color": GREY, "width": 6}
    styles = {reference: {"name": escape(reference), "line": line, "marker": {"color": GREY}}}
    others = [(name, standing) for name, standing in found.items() if name != reference]
    for n, (name, (state, problem, _)) in enumerate(others):
        parity, colour, label = comparison.parity.get(name), COLOURS[n % len(COLOURS)], name
        line = {"color": colour, "width": 2, "dash": DASHES[n % len(DASHES)]}
        if problem:
            label = f"{name} ({state})"
        elif parity and parity.reference != reference:
            label = f"{name} (as {parity.reference})"
        marker = {"color": colour, "symbol": SYMBOLS[n % len(SYMBOLS)]}
        styles[name] = {"name": escape(label), "line": line, "marker": marker}
    return styles


def _layout(title: str, hovermode: str = "x unified", **y: Any) -> dict[str, Any]:
    axis = {"gridcolor": "rgba(128,136,150,.25)", "zeroline": False, "automargin": True}
    return {
        "height": 440,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "hovermode": hovermode,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        "xaxis": {**axis, "title": {"text": "optimizer step"}, "spikethickness": 1},
        "yaxis": {**axis, "title": {"text": title}, **y},
    }


def _trace(points: Points, style: Mapping[str, Any], hover: str) -> dict[str, Any]:
    hover = f"step %{{x}}, {hover}<extra>%{{fullData.name}}</extra>"
    x, y = [step for step, _ in points], [value for _, value in points]
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "hovertemplate": hover, **style}


def _draw_lines(title: str, noun: str, points: Mapping[str, Points], styles: Styles) -> Curves:
    traces = [_trace(p, styles[n], f"{noun} %{{y:.7g}}") for n, p in points.items() if p]
    return Curves(title, {"data": traces, "layout": _layout(noun)})


def _relative_differences(run: Record, other: Record) -> list[tuple[int, float]]:
    """Return (step, |a-b|/|b|) of the loss at the steps both have, where that is a number."""
    expected = {step.step: step.loss for step in other.steps}
    pairs = [(s.step, s.loss, expected[s.step]) for s in run.steps if s.step in expected]
    return [(n, abs(a - b) / abs(b) if b else 0.0) for n, a, b in pairs if b or a == b]


def _draw_differences(comparison: Comparison, styles: Styles) -> Curves:
    """Draw each run's difference from the record it is compared with, in dots.

    Dots do not hide one another as lines up and down do. A log axis has no zero, so 'equal' is a
    line of its own, a decade below all."""
    known = {**comparison.controls, **comparison.strategies}
    parity = {
        name: p
        for name, p in comparison.parity.items()
        if name != comparison.reference and p.reference in known
    }
    found = {n: _relative_differences(known[n], known[p.reference]) for n, p in parity.items()}
    limits = sorted({p.tolerance["loss"] for p in parity.values()})
    values = [value for points in found.values() for _, value in points if value] + limits
    low = math.floor(math.log10(min(values, default=1)))
    high = math.ceil(math.log10(max(values, default=1)))
    floor, decades = 10.0 ** (low - 1), range(low, high + 1, 1 + (high - low) // 10)
    traces = [
        _draw_dots(points, floor, styles[name], parity[name])
        for name, points in found.items()
        if points
    ]
    ticks = {floor: "equal", **{10.0**power: f"1e{power}" for power in decades}}
    y = {"tickvals": [*ticks], "ticktext": [*ticks.values()]}
    y |= {"type": "log", "range": [low - 1.3, high + 0.3]}
    layout = _layout("relative difference", "closest", **y)
    layout["legend"]["itemsizing"] = "constant"
    layout["shapes"] = [_draw_limit(limit) for limit in limits]
    return Curves("Difference from the reference", {"data": traces, "layout": layout})


def _draw_dots(
    points: Points, floor: float, style: Mapping[str, Any], parity: Parity
) -> dict[str, Any]:
    """Draw a difference of zero at `floor`, and the steps that were excused as large dots."""
    excused = {found["step"] for found in parity.excused if found["quantity"] == "loss"}
    sizes = [12 if step in excused else 6 for step, _ in points]
    texts = [format_diff(value) if value else "equal" for _, value in points]
    marker = {**style["marker"], "size": sizes, "line": {"width": 0}}
    style = {**style, "mode": "markers", "marker": marker, "customdata": texts}
    drawn = [(step, value or floor) for step, value in points]
    return _trace(drawn, style, "difference %{customdata}")


def _draw_limit(limit: float) -> dict[str, Any]:
    place = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit}
    label = {"text": f"tolerance {format_diff(limit)}", "textposition": "start"}
    return {**place, "line": {"color": RED, "width": 1.5, "dash": "dash"}, "label": label}
