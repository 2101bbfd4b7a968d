"""What report.html draws: curves as plain dicts in plotly's format, bars as plain rows.

None of this imports plotly. Names in a figure are escaped, since plotly reads a small HTML of its
own in any text; those in `Bars` are plain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from hybrid.records import Comm, Comparison, Record
from hybrid.report.formats import format_bytes, format_diff
from hybrid.report.table import find_meaning, find_peaks, find_rate, format_pace
from hybrid.report.verdict import judge

GREY, RED = "#868e99", "#d6453d"
# Eight hues, for on white and on black; dashes and symbols serve who sees no colours.
COLOURS = ("#2f7ed8", "#e08a00", "#0f9d76", "#d1549b", "#8a63d2", "#c8501e", "#23a6c4", "#8f9a1c")
DASHES = ("solid", "dash", "dot", "longdash", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up", "triangle-down", "star")

Row = tuple[str, list[list[tuple[str, float, str]]]]
Points = Sequence[tuple[float, float]]
Styles = dict[str, dict[str, Any]]


class Curves(NamedTuple):
    """A figure with its heading and the sentence below it."""

    title: str
    caption: str
    figure: dict[str, Any]


class Bars(NamedTuple):
    """A row a run: the figure to print, and lines one below the other, each of pieces end to end
    (what it is, how long, its colour). `key` tells what colours mean that are not a run's."""

    title: str
    caption: str
    rows: dict[str, Row]
    key: Mapping[str, str]


def curves(comparison: Comparison) -> list[Curves]:
    """Those there are figures for. Runs that lost parity stay: this is where one sees how."""
    runs, styles = comparison.strategies, _make_styles(comparison)
    losses = {name: [(s.step, s.loss) for s in run.steps] for name, run in runs.items()}
    tested = {n: [(e.step, e.result.loss) for e in run.evals] for n, run in runs.items()}
    tested = {name: points for name, points in tested.items() if len(points) > 1}
    dotted = {name: {**style, "mode": "lines+markers"} for name, style in styles.items()}
    key = "max_relative_drift"
    drifts = {n: [(at["step"], at[key]) for at in run.drift or []] for n, run in runs.items()}
    overlaid = "Runs that agree lie on each other, over the broad grey line of the reference. "
    overlaid += "Click a name to hide its line, double-click to keep it alone."
    between = "Over the whole test set, after so many optimizer steps; 0 is before training."
    apart = "How far the rank furthest away was from the mean of all, just before they merged."
    found = [
        _lines("Training loss", overlaid, "loss", losses, styles),
        _difference(comparison, styles),
        _lines("Validation loss", between, "validation loss", tested, dotted),
        _lines("Drift between ranks", apart, "relative drift", drifts, styles),
    ]
    return [one for one in found if one.figure["data"]]


def bars(comparison: Comparison) -> list[Bars]:
    """Costs, and only of the runs that earned that they are shown."""
    runs = {n: comparison.strategies[n] for n, run in judge(comparison).items() if not run.problem}
    colours = {name: style["line"]["color"] for name, style in _make_styles(comparison).items()}
    tokens, in_steps = find_meaning(comparison)
    paces: dict[str, Row] = {
        name: (
            format_pace(pace, tokens),
            [[("median step", find_rate(pace, tokens), colours[name])]],
        )
        for name, run in runs.items()
        if (pace := run.throughput)
    }
    peaks = {
        name: _rank_lines(find_peaks(run.memory, in_steps), colours[name])
        for name, run in runs.items()
        if run.memory
    }
    hows = "; ".join(sorted({run.memory.how for run in runs.values() if run.memory}))
    median = "By the median step; by the mean one too where the two are unlike."
    when = "the first training steps" if in_steps else "the first steps and building the engine"
    each = f"In {when}. A bar a rank; the figure is the greatest. By {hows}."
    found = [
        Bars(f"{'Tokens' if tokens else 'Samples'} per second", median, paces, {}),
        Bars("Peak memory", each, peaks, {}),
        _bytes({name: run.comm for name, run in runs.items() if run.comm}),
    ]
    return [one for one in found if one.rows]


def _make_styles(comparison: Comparison) -> Styles:
    """The reference is a broad grey band, so that the lines that cover it leave it in sight."""
    reference, standings = comparison.reference, judge(comparison)
    line: dict[str, Any] = {"color": GREY, "width": 6}
    styles = {reference: {"name": escape(reference), "line": line, "marker": {"color": GREY}}}
    others = [(name, standing) for name, standing in standings.items() if name != reference]
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
        **{"height": 440, "margin": {"l": 8, "r": 12, "t": 12, "b": 8}, "hovermode": hovermode},
        **{"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "showlegend": True},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": GREY},
        "xaxis": {**axis, "title": {"text": "optimizer step"}, "spikethickness": 1},
        "yaxis": {**axis, "title": {"text": title}, **y},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    }


def _curve(points: Points, style: Mapping[str, Any], hover: str) -> dict:
    hover = f"step %{{x}}, {hover}<extra>%{{fullData.name}}</extra>"
    x, y = [step for step, _ in points], [value for _, value in points]
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "hovertemplate": hover, **style}


def _lines(title: str, caption: str, noun: str, points: dict, styles: Styles) -> Curves:
    traces = [_curve(p, styles[n], f"{noun} %{{y:.7g}}") for n, p in points.items() if p]
    return Curves(title, caption, {"data": traces, "layout": _layout(noun)})


def _relative_differences(run: Record, other: Record) -> list[tuple[int, float]]:
    """(step, |a-b|/|b|) of the loss at the steps both have, where that is a number."""
    expected = {step.step: step.loss for step in other.steps}
    pairs = [(s.step, s.loss, expected[s.step]) for s in run.steps if s.step in expected]
    return [(n, abs(a - b) / abs(b) if b else 0.0) for n, a, b in pairs if b or a == b]


def _difference(comparison: Comparison, styles: Styles) -> Curves:
    """Each run from the record it is judged by, in dots, which do not hide one another as lines up
    and down do. A log axis has no zero, so 'equal' is a line of its own, a decade below all."""
    known = {**comparison.controls, **comparison.strategies}
    parity = {name: p for name, p in comparison.parity.items() if name != comparison.reference}
    found = {n: _relative_differences(known[n], known[p.reference]) for n, p in parity.items()}
    limits = sorted({p.tolerance["loss"] for p in parity.values()})
    values = [value for points in found.values() for _, value in points if value] + limits
    low = math.floor(math.log10(min(values, default=1)))
    high = math.ceil(math.log10(max(values, default=1)))
    floor, decades = 10.0 ** (low - 1), range(low, high + 1, 1 + (high - low) // 10)
    traces = []
    for name, points in found.items():
        excused = {e["step"] for e in parity[name].excused if e["quantity"] == "loss"}
        sizes = [12 if n in excused else 6 for n, _ in points]
        texts = [format_diff(value) if value else "equal" for _, value in points]
        marker = {**styles[name]["marker"], "size": sizes, "line": {"width": 0}}
        style = {**styles[name], "mode": "markers", "marker": marker, "customdata": texts}
        drawn = [(n, value or floor) for n, value in points]
        traces += [_curve(drawn, style, "difference %{customdata}")] if drawn else []
    y = {"type": "log", "range": [low - 1.3, high + 0.3]}
    y |= {"tickvals": [floor, *(10.0**power for power in decades)]}
    y |= {"ticktext": ["equal", *(f"1e{power}" for power in decades)]}
    layout = _layout("relative difference", "closest", **y)
    layout["legend"]["itemsizing"] = "constant"
    layout["shapes"] = [_tolerance(limit) for limit in limits]
    caption = (
        "|a-b|/|b| of the loss, each run against the record it is judged by. Dots on the line "
        '"equal" are equal in every digit recorded; large ones, if any, are excused steps.'
    )
    return Curves("Difference from the reference", caption, {"data": traces, "layout": layout})


def _tolerance(limit: float) -> dict[str, Any]:
    label = {"text": f"tolerance {format_diff(limit)}", "textposition": "start"}
    return {
        **{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit},
        **{"line": {"color": RED, "width": 1.5, "dash": "dash"}, "label": label},
    }


def _rank_lines(peaks: list[int], colour: str) -> Row:
    lines = [[(f"rank {n}: {format_bytes(p)}", float(p), colour)] for n, p in enumerate(peaks)]
    return format_bytes(max(peaks)), lines


def _bytes(comms: Mapping[str, Comm]) -> Bars:
    ops = {op for c in comms.values() for op, by in c.by_op.items() if any(by["sent_bytes"])}
    key = dict(zip(sorted(ops), itertools.cycle(COLOURS), strict=False))
    rows = {}
    for name, comm in comms.items():
        top = max(comm.bytes_per_step)
        rank = comm.bytes_per_step.index(top)
        sent = {op: comm.by_op[op]["sent_bytes"][rank] for op in key if op in comm.by_op}
        pieces = [(f"{op}: {format_bytes(value)}", value, key[op]) for op, value in sent.items()]
        rows[name] = (format_bytes(top), [pieces])
    caption = "Of the rank that sends most: calls counted, ring algorithms assumed."
    return Bars("Bytes sent a step", caption, rows, key)
