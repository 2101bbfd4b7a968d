"""This module prepares what report.html draws: curves as dicts in plotly's format, bars as rows.

A colour stands for a run, the same one in every plot. Bars have names beside them and no colours,
and red and green are the verdict's alone. The module does not import plotly. Names in a figure are
escaped here, since plotly reads a small HTML of its own in any text. Texts in `Bars` are plain."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ..records import Comm, Comparison, Parity, Record
from .costs import Meaning, find_meaning
from .formats import format_bytes, format_diff
from .standing import Standing, standings, trusted_runs
from .table import build_rows

GREY, CLEAR = "#868e99", "rgba(0,0,0,0)"
# These hues work on white and on black, none is red or green. Dashes and symbols help readers who
# see no colours. The strategies of this project have the same one in every comparison.
COLOURS = {
    "ddp": "#2f7ed8",
    "local_sgd": "#e08a00",
    "fsdp": "#8a63d2",
    "zero1": "#23a6c4",
    "zero2": "#d1549b",
    "zero3": "#a0703c",
    "pipeline": "#5561e0",
    "2d": "#b09a00",
}
DASHES = ("solid", "dash", "dot", "longdash", "dashdot")
SHOWN_PART = 0.01  # of a bar: smaller ones are told to those alone who rest on them
SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up", "triangle-down", "star")

Piece = tuple[str, float]  # of a bar: what it is, its length
Lines = list[list[Piece]]  # bars one below the other, each of pieces laid end to end
Points = Sequence[tuple[float, float]]
Styles = dict[str, dict[str, Any]]


class Curves(NamedTuple):
    """Holds a figure in plotly's format with its heading."""

    title: str
    figure: dict[str, Any]


class Row(NamedTuple):
    """Holds a run's figure as text, its bars, and what the figure is made of."""

    text: str
    lines: Lines
    parts: str = ""


class Bars(NamedTuple):
    """Holds a row for each run that has the cost."""

    title: str
    rows: dict[str, Row]

    @property
    def longest(self) -> float:
        """Return the length of the longest bar, which takes the whole width."""
        bars = [line for row in self.rows.values() for line in row.lines]
        return max(sum(length for _, length in bar) for bar in bars) or 1


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
    runs, table = trusted_runs(comparison), build_rows(comparison)
    meaning = find_meaning(comparison.strategies)
    drawn = {name: _draw_costs(run, meaning) for name, run in runs.items()}
    charts = [
        (f"{meaning.unit.capitalize()} per second", f"{meaning.unit}/s"),
        ("Peak memory", "peak memory"),
        ("Bytes sent a step", "bytes sent"),
    ]
    found = [
        Bars(title, {n: Row(table[n][at], *d[at]) for n, d in drawn.items() if at in d})
        for title, at in charts
    ]
    return [chart for chart in found if chart.rows]


def _draw_costs(run: Record, meaning: Meaning) -> dict[str, tuple[Lines, str]]:
    """Return the bars of a run and their parts, by the column of the table that has the figure."""
    drawn: dict[str, tuple[Lines, str]] = {}
    if run.throughput:
        median = ("median step", meaning.find_rate(run.throughput))
        drawn[f"{meaning.unit}/s"] = ([[median]], "")
    if run.memory:
        peaks = enumerate(meaning.find_peaks(run.memory))
        drawn["peak memory"] = ([[(f"rank {n}: {format_bytes(p)}", p)] for n, p in peaks], "")
    if run.comm:
        pieces = _find_sent(run.comm)
        parts = [f"{op} {format_bytes(size)}" for op, size in pieces]
        titles = [(text, size) for text, (_, size) in zip(parts, pieces, strict=True)]
        least = SHOWN_PART * sum(size for _, size in pieces)
        large = [text for text, size in titles if size >= least]
        drawn["bytes sent"] = ([titles], ", ".join(large))
    return drawn


def _find_sent(comm: Comm) -> list[Piece]:
    """Return the operations of the rank that sends most, the greatest first."""
    rank = comm.bytes_per_step.index(max(comm.bytes_per_step))
    sent = [(op, by["sent_bytes"][rank]) for op, by in comm.by_op.items()]
    return sorted(((op, size) for op, size in sent if size), key=lambda piece: -piece[1])


def _choose_colours(names: Sequence[str]) -> dict[str, str]:
    """Give each run a colour: a strategy its own, and any other run one that is still free."""
    taken = {name: COLOURS[name] for name in names if name in COLOURS}
    hues = list(COLOURS.values())
    free = [hue for hue in hues if hue not in taken.values()] or hues
    others = [name for name in names if name not in COLOURS]
    return taken | {name: free[n % len(free)] for n, name in enumerate(others)}


def _make_styles(comparison: Comparison) -> Styles:
    """Return the name, line and marker of each run; the reference is a broad grey band.

    So the lines that cover the reference leave it in sight."""
    reference, found = comparison.reference, standings(comparison)
    line: dict[str, Any] = {"color": GREY, "width": 6}
    styles = {reference: {"name": escape(reference), "line": line, "marker": {"color": GREY}}}
    others = [standing for name, standing in found.items() if name != reference]
    colours = _choose_colours([standing.name for standing in others])
    for n, standing in enumerate(others):
        colour = colours[standing.name]
        line = {"color": colour, "width": 2, "dash": DASHES[n % len(DASHES)]}
        marker = {"color": colour, "symbol": SYMBOLS[n % len(SYMBOLS)]}
        label = escape(_label(standing, comparison))
        styles[standing.name] = {"name": label, "line": line, "marker": marker}
    return styles


def _label(standing: Standing, comparison: Comparison) -> str:
    """Return a run's name with its standing, or with the record that it is compared with."""
    parity = comparison.parity.get(standing.name)
    if standing.reason:
        return f"{standing.name} ({standing.state})"
    if parity and parity.reference != comparison.reference:
        return f"{standing.name} (as {parity.reference})"
    return standing.name


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
    limits = sorted({p.tolerance["loss"] for p in parity.values() if "loss" in p.tolerance})
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
    label = {"text": f"tolerance {format_diff(limit)}", "textposition": "end"}
    return {**place, "line": {"color": GREY, "width": 1.5, "dash": "dash"}, "label": label}
