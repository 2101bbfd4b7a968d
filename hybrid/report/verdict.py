"""What may be said and shown of each run: parity before speed.

`judge` says how far each run may be trusted, `verdict` puts it into words, `build_rows` makes a
table without the costs of runs with a problem. All text is plain; each format escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hybrid.records import Comparison, Parity, Record, Throughput

DASH = "\N{EM DASH}"
IDENTITY = ("strategy", "layout", "status")  # flush left, the figures flush right
COSTS = ("samples/s", "step ms", "peak memory", "bytes sent")
HEADERS = (*IDENTITY, "loss diff", "weight diff", "test result", *COSTS)
LEGEND = (
    "Differences are |a-b|/|b| from the reference, the greatest of any step or parameter. Speed is "
    "that of the median step, and of the mean one too where the two are unlike; memory and bytes "
    "sent a step are those of the rank that has most. A dash: not measured, or not shown, since "
    "only a run proved equal has its costs shown."
)
BROKEN = ("not equal", "failed", "not proved", "not compared")  # gravest first
UNLIKE_STEPS = 1.2  # a mean step this much longer than the median one deserves a word


class Standing(NamedTuple):
    """How far a run may be trusted, in a word or two. With a `problem` it has earned no cost."""

    state: str
    problem: str = ""


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
    return Standing("equal") if parity.ok else Standing("not equal", _difference(name, parity))


def _difference(name: str, parity: Parity) -> str:
    """Where `name` left its reference: step, quantity, both values, likely cause."""
    found = parity.first_difference
    if found is None:
        return f"{name} differs from {parity.reference}"
    where = "" if found.step is None else f" at step {found.step}"
    values = (found.got, found.expected)
    got, expected = (f"{v:.9g}" if isinstance(v, float) else str(v) for v in values)
    cause = f"; likely cause: {found.likely_cause}" if found.likely_cause else ""
    pair = f"got {got}, expected {expected}"
    return f"{name} leaves {parity.reference}{where} in {found.quantity}: {pair}{cause}"


def verdict(comparison: Comparison) -> Verdict:
    """What went wrong first, then what agrees and how closely."""
    found, reference = judge(comparison), comparison.reference
    states = {state: [n for n in found if found[n].state == state] for state in BROKEN}
    broken = [name for names in states.values() for name in names]
    equal = [name for name in found if found[name].state == "equal"]
    agree = f"equal: {_who_agrees(comparison, equal)}"
    if reference not in found or found[reference].problem:
        headline = f"failed: the reference {reference} gave nothing to compare with"
    elif broken:
        parts = {state: [_name_step(comparison, n) for n in states[state]] for state in states}
        headline = "; ".join(
            f"{state}: {', '.join(parts[state])}" for state in parts if parts[state]
        )
    elif not comparison.ok:
        headline = "not equal: the comparison did not hold; compare.json has the figures"
    else:
        headline = agree if equal else f"nothing compared: only {reference} ran"
    away = [name for name in found if found[name].state == "not possible"]
    details = [f"{flatten(found[name].problem, 400)}." for name in broken]
    details += [f"E{agree[1:]}."] if broken and equal else []
    details += _how_closely(comparison, equal)
    details += [f"{flatten(found[name].problem, 400)}." for name in away]
    ok = comparison.ok and not broken and reference in found
    return Verdict(ok, f"{headline[0].upper()}{headline[1:]}.", details)


def _name_step(comparison: Comparison, name: str) -> str:
    parity = comparison.parity.get(name)
    first = parity.first_difference if parity else None
    if first is None:
        return name
    where = "" if first.step is None else f" from step {first.step}"
    return f"{name}{where} ({first.quantity})"


def _who_agrees(comparison: Comparison, equal: list[str]) -> str:
    """'ddp, fsdp computed what single did; local_sgd computed what local_sgd_emulation did'."""
    groups: dict[str, list[str]] = {}
    for name in equal:
        groups.setdefault(comparison.parity[name].reference, []).append(name)
    return "; ".join(f"{', '.join(names)} computed what {r} did" for r, names in groups.items())


def _how_closely(comparison: Comparison, equal: list[str]) -> list[str]:
    """The greatest differences of runs that held, and what was excused."""
    parity, worst, sentences = {n: comparison.parity[n] for n in equal}, [], []
    for what, key in (("loss", "max_loss_diff"), ("weights", "max_weight_diff")):
        known = [(d, n) for n in equal if (d := getattr(parity[n], key)) is not None]
        if known:
            value, name = max(known)
            worst.append(f"{format_diff(value)} in the {what}" + (f" ({name})" if value else ""))
    if worst:
        sentences.append(f"Greatest relative difference among them: {', '.join(worst)}.")
    for name in equal:
        if steps := excused_steps(parity[name]):
            more = f"; {len(steps) - 3} more" if len(steps) > 3 else ""
            sentences.append(
                f"{name} passed the tolerance at {len(steps)} steps, excused since a control, the "
                "reference with its batches summed in another order, differs by at least a quarter "
                f"as much there ({'; '.join(steps[:3])}{more})."
            )
    return sentences


def excused_steps(parity: Parity) -> list[str]:
    """Both figures of every step that passed the tolerance and was let through all the same."""
    shown = [(x["step"], format_diff(x["difference"]), x["control"]) for x in parity.excused]
    return [f"step {n:.0f}: {diff}, control {format_diff(control)}" for n, diff, control in shown]


def build_rows(comparison: Comparison) -> dict[str, list[str]]:
    """The table below `HEADERS`, a row for each strategy."""
    rows = {}
    for name, (state, problem) in judge(comparison).items():
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


def flatten(text: str, limit: int = 2000) -> str:
    """`text` on one line, cut at `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


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
    """The axes longer than 1: pp 2 x dp 2 / shard 2. `replicate` that is just `dp` is left out."""
    inner = ["shard"] if layout.get("replicate") == layout.get("dp") else ["replicate", "shard"]
    groups = [
        [f"{a} {layout[a]}" for a in g if layout.get(a, 1) > 1] for g in (["pp", "dp"], inner)
    ]
    return " / ".join(" x ".join(group) for group in groups if group) or DASH


def format_value(value: Any) -> str:
    """Any JSON value on one line; long lists are cut and say how long they are."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        more = [f"\N{HORIZONTAL ELLIPSIS} {len(value)} in all"] if len(value) > 6 else []
        return f"({', '.join([*map(format_value, value[:6]), *more])})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)
