"""What may be said and shown of each run: parity before speed.

`judge` says how far each run may be trusted, `verdict` puts it into words, `build_rows` makes a
table without the costs of runs with a problem. All text is plain; each format escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any, NamedTuple

from hybrid.records import Comparison, Parity, Record, Throughput

DASH = "\N{EM DASH}"
IDENTITY = ("strategy", "layout", "status")  # flush left, the figures flush right
COSTS = ("samples/s", "step ms", "peak memory", "bytes sent")
HEADERS = (*IDENTITY, "loss diff", "weight diff", "test result", *COSTS)
LEGEND = (
    "Differences: |a-b|/|b|, the greatest of any step or parameter. Speed: by the median step, by "
    "the mean too where they are unlike. Memory, bytes sent a step: the rank that has most. Dash: "
    "not measured, or not shown, since only runs proved equal have their costs shown."
)
BROKEN = ("not equal", "failed", "not proved", "not compared")  # gravest first
STATES = (*BROKEN, "equal", "not possible")
UNLIKE_STEPS = 1.2  # a mean step this much longer than the median one deserves a word


class Standing(NamedTuple):
    """How far a run may be trusted, in a word or two; with a `problem` no cost is shown. `where` it
    left its reference goes into the headline."""

    state: str
    problem: str = ""
    where: str = ""


class Verdict(NamedTuple):
    """`headline` is one sentence, `details` what a reader asks next."""

    ok: bool
    headline: str
    details: list[str]


def judge(comparison: Comparison) -> dict[str, Standing]:
    """The standing of every strategy, in the comparison's order."""
    return {name: _judge_run(comparison, name) for name in comparison.strategies}


def _judge_run(comparison: Comparison, name: str) -> Standing:
    record, parity = comparison.strategies[name], comparison.parity.get(name)
    reason = record.reason or "no reason was recorded"
    if record.status == "failed":
        return Standing("failed", f"{name} failed: {reason}")
    if record.status == "not_possible":
        return Standing("not possible", f"{name} is not possible here: {reason}")
    if record.receipt is None or not record.receipt.engaged:
        why = record.receipt.reason if record.receipt else "it left no receipt"
        problem = f"{name} is not proved to be what was asked for: {why or 'see its receipt'}"
        return Standing("not proved", problem)
    if name == comparison.reference:
        return Standing("reference")
    if parity is None:
        return Standing("not compared", f"{name} was not compared with {comparison.reference}")
    return Standing("equal") if parity.ok else _describe_difference(name, parity)


def _describe_difference(name: str, parity: Parity) -> Standing:
    """Where `name` left its reference: step, quantity, both values, likely cause."""
    found = parity.first_difference
    if found is None:
        return Standing("not equal", f"{name} differs from {parity.reference}")
    step = "" if found.step is None else f"step {found.step}"
    values = (found.got, found.expected)
    got, expected = (f"{v:.9g}" if isinstance(v, float) else str(v) for v in values)
    cause = f"; likely cause: {found.likely_cause}" if found.likely_cause else ""
    place = f"{step and f' at {step}'} in {found.quantity}: got {got}, expected {expected}{cause}"
    where = f"{step and f' from {step}'} ({found.quantity})"
    return Standing("not equal", f"{name} leaves {parity.reference}{place}", where)


def verdict(comparison: Comparison) -> Verdict:
    """What went wrong first, then what agrees and how closely."""
    found, reference = judge(comparison), comparison.reference
    states = {state: [n for n in found if found[n].state == state] for state in STATES}
    broken = {state: names for state, names in states.items() if names and state in BROKEN}
    held = reference in found and not found[reference].problem
    agree = f"equal: {_who_agrees(comparison, states['equal'])}"
    if not held:
        headline = f"failed: the reference {reference} gave nothing to compare with"
    elif broken:
        parts = {state: [n + found[n].where for n in names] for state, names in broken.items()}
        headline = "; ".join(f"{state}: {', '.join(names)}" for state, names in parts.items())
    elif not comparison.ok:
        headline = "not equal: the comparison did not hold; compare.json has the figures"
    else:
        headline = agree if states["equal"] else f"nothing compared: only {reference} ran"
    problems = {n: f"{shorten(run.problem, 400, placeholder=' ...')}." for n, run in found.items()}
    details = [problems[name] for names in broken.values() for name in names]
    details += [f"E{agree[1:]}."] if broken and states["equal"] else []
    details += _how_closely({name: comparison.parity[name] for name in states["equal"]})
    details += [problems[name] for name in states["not possible"]]
    headline = f"{headline[0].upper()}{headline[1:]}."
    return Verdict(comparison.ok and held and not broken, headline, details)


def _who_agrees(comparison: Comparison, equal: list[str]) -> str:
    """'ddp, fsdp computed what single did; local_sgd computed what local_sgd_emulation did'."""
    groups: dict[str, list[str]] = {}
    for name in equal:
        groups.setdefault(comparison.parity[name].reference, []).append(name)
    return "; ".join(f"{', '.join(names)} computed what {r} did" for r, names in groups.items())


def _how_closely(equal: dict[str, Parity]) -> list[str]:
    """The greatest differences of runs that held, and what was excused."""
    losses = [p.max_loss_diff for p in equal.values() if p.max_loss_diff is not None]
    weights = [p.max_weight_diff for p in equal.values() if p.max_weight_diff is not None]
    most = [f"{format_diff(max(losses))} in the loss"] if losses else []
    most += [f"{format_diff(max(weights))} in the weights"] if weights else []
    sentences = [f"They differ by at most {', '.join(most)}."] if most else []
    for name, parity in equal.items():
        if parity.excused:
            worst = max(parity.excused, key=lambda step: step["difference"])
            sentences.append(
                f"{name} passed the tolerance at {len(parity.excused)} steps, excused since a "
                "control, the reference with its batches summed in another order, differs by a "
                f"quarter as much or more. The greatest: {format_value(worst)}."
            )
    return sentences


def build_rows(comparison: Comparison) -> dict[str, list[str]]:
    """The table below `HEADERS`, a row for each strategy."""
    rows = {}
    for name, (state, problem, _) in judge(comparison).items():
        record, parity = comparison.strategies[name], comparison.parity.get(name)
        diffs = (parity.max_loss_diff, parity.max_weight_diff) if parity else (None, None)
        costs = [DASH] * len(COSTS) if problem else _costs(record)
        identity = [name, format_layout(record.layout), state]
        rows[name] = [*identity, *map(format_diff, diffs), _test_result(record), *costs]
    return rows


def _costs(record: Record) -> list[str]:
    pace, memory, comm = record.throughput, record.memory, record.comm
    return [
        format_pace(pace) if pace else DASH,
        format_number(pace.step_s_median * 1e3) if pace else DASH,
        format_bytes(max(memory.peak_bytes)) if memory else DASH,
        format_bytes(max(comm.bytes_per_step)) if comm else DASH,
    ]


def _test_result(record: Record) -> str:
    if record.eval is None:
        return DASH
    accuracy = record.eval.accuracy
    return f"loss {record.eval.loss:.5g}" if accuracy is None else f"{accuracy:.2%}"


def format_diff(value: float | None) -> str:
    """A relative difference: 0, 3.1e-7."""
    return DASH if value is None else f"{value:.2g}".replace("e-0", "e-")


def format_number(value: float) -> str:
    """Three digits or, from 100 on, all of the whole ones: 0.0123, 2.30, 12,345."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def format_bytes(value: float) -> str:
    """A size in binary units: 512 B, 1.23 MiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{format_number(value)} {units[0]}"


def format_pace(pace: Throughput) -> str:
    """Samples a second by the median step, and by the mean one where steps are not alike."""
    ratio, median = pace.step_s_mean / pace.step_s_median, format_number(pace.samples_per_s)
    mean = format_number(pace.samples_per_s / ratio)
    return f"{median} (mean {mean})" if ratio > UNLIKE_STEPS else median


def format_layout(layout: Mapping[str, int]) -> str:
    """The axes longer than 1: 'pp 2, dp 2'. `replicate` that is just `dp` is left out."""
    again = layout.get("replicate") == layout.get("dp")
    axes = [a for a, n in layout.items() if n > 1 and not (again and a == "replicate")]
    return ", ".join(f"{axis} {layout[axis]}" for axis in axes) or DASH


def format_value(value: Any) -> str:
    """Any JSON value on one line; long lists are cut and say how long they are."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        more = [f"\N{HORIZONTAL ELLIPSIS} {len(value)} in all"] if len(value) > 6 else []
        return f"({', '.join([*map(format_value, value[:6]), *more])})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.6g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
