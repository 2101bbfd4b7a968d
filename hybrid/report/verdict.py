"""What may be said of each run: parity before speed.

`judge` says how far each run may be trusted, `verdict` puts it into words. All text is plain; each
format escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any, NamedTuple

from hybrid.records import Comparison, Parity, Record
from hybrid.report.formats import format_diff

BROKEN = ("not equal", "failed", "not proved", "not compared")  # gravest first
STATES = (*BROKEN, "equal", "not possible")


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
    details += _tell_skipped(comparison.strategies)
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
    return sentences + _tell_excused(equal)


def _tell_excused(equal: Mapping[str, Parity]) -> list[str]:
    """One sentence for all runs with something excused, since the reason is the same."""
    names = [name for name, parity in equal.items() if parity.excused]
    if not names:
        return []
    counts = [len(equal[name].excused) for name in names]
    low, high = min(counts), max(counts)
    places = f"{low} to {high} places" if low < high else f"{high} place{'s' * (high > 1)}"
    each = " each" if len(names) > 1 else ""
    worst = max((e for n in names for e in equal[n].excused), key=lambda e: e["difference"])
    return [
        f"{', '.join(names)} exceeded the tolerance at {places}{each}, excused since a control, "
        "the reference with its batches summed in another order, differs there by a quarter as "
        f"much or more; the greatest: {format_excused(worst)}."
    ]


def _tell_skipped(runs: Mapping[str, Record]) -> list[str]:
    """How many steps each run skipped, where any did."""
    counts: dict[str, list[str]] = {}
    for name, run in runs.items():
        if run.steps:
            count = f"{sum(step.skipped for step in run.steps)} of {len(run.steps)}"
            counts.setdefault(count, []).append(name)
    if not any(step.skipped for run in runs.values() for step in run.steps):
        return []
    parts = [f"{count} under {', '.join(names)}" for count, names in counts.items()]
    return [f"Steps skipped, since gradients overflowed in fp16: {'; '.join(parts)}."]


def format_excused(found: Mapping[str, Any]) -> str:
    """'loss at step 25, difference 3e-6, control 1e-6': one entry of `Parity.excused`."""
    when = "the end" if found["step"] is None else f"step {found['step']}"
    sizes = [f"{key} {format_diff(found[key])}" for key in ("difference", "control")]
    return f"{found['quantity']} at {when}, {', '.join(sizes)}"
