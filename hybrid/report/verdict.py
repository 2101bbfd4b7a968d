"""This module says how far each run may be trusted: parity comes before speed.

`standings` says it for each run in a word, `verdict` for the whole comparison in sentences. All
text is plain; each output format escapes it."""

from collections.abc import Mapping
from textwrap import shorten
from typing import Any, NamedTuple

from ..records import Comparison, Parity, Record
from .formats import format_diff, group_names

BROKEN = ("not equal", "failed", "not proved", "not compared")  # the gravest first
AT_PROXY = "equal at the proxy size"  # by a small job that was compared in place of this one
STATES = (*BROKEN, "equal", AT_PROXY, "not possible")


class Standing(NamedTuple):
    """Says in a word or two how far a run may be trusted.

    No cost is shown for a run with a `problem`. The headline quotes `where`, the place at which the
    run left its reference."""

    state: str
    problem: str = ""
    where: str = ""


class Verdict(NamedTuple):
    """Holds one sentence, the headline, and the sentences that answer what a reader asks next."""

    ok: bool
    headline: str
    details: list[str]


def standings(comparison: Comparison) -> dict[str, Standing]:
    """Return the standing of every strategy, in the comparison's order."""
    return {name: _standing_of(comparison, name) for name in comparison.strategies}


def trusted_runs(comparison: Comparison) -> dict[str, Record]:
    """Return the runs without a problem, the only ones whose costs may be shown."""
    found = standings(comparison)
    return {name: run for name, run in comparison.strategies.items() if not found[name].problem}


def _standing_of(comparison: Comparison, name: str) -> Standing:
    record, parity = comparison.strategies[name], comparison.parity.get(name)
    reason = record.reason or "no reason was recorded"
    if record.status == "running":
        return Standing("failed", f"{name} did not finish")
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
    if parity is None or (parity.reason and not parity.ok):
        because = f": {parity.reason}" if parity else ""
        problem = f"{name} was not compared with {comparison.reference}{because}"
        return Standing("not compared", problem)
    if parity.ok:
        return Standing(AT_PROXY if parity.reference == "proxy" else "equal")
    return _describe_difference(name, parity)


def _describe_difference(name: str, parity: Parity) -> Standing:
    """Say where `name` left its reference: step, quantity, both values and the likely cause."""
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
    """Say what went wrong first, then which runs agree and how closely."""
    found, reference = standings(comparison), comparison.reference
    states = {state: [n for n in found if found[n].state == state] for state in STATES}
    broken = {state: names for state, names in states.items() if names and state in BROKEN}
    held = reference == "proxy" or (reference in found and not found[reference].problem)
    equal = {name: comparison.parity[name] for name in states["equal"] + states[AT_PROXY]}
    pairs = group_names((name, parity.reference) for name, parity in equal.items())
    agree = "; ".join(
        f"{AT_PROXY}: {names}" if other == "proxy" else f"{names} computed what {other} did"
        for other, names in pairs.items()
    )
    if not held:
        headline = f"failed: the reference {reference} gave nothing to compare with"
    elif broken:
        parts = {state: [n + found[n].where for n in names] for state, names in broken.items()}
        headline = "; ".join(f"{state}: {', '.join(names)}" for state, names in parts.items())
    elif not comparison.ok:
        headline = "not equal: the comparison did not hold; compare.json has the figures"
    else:
        plain = agree if reference == "proxy" else f"equal: {agree}"
        headline = plain if equal else f"nothing compared: only {reference} ran"
    problems = {n: f"{shorten(run.problem, 400, placeholder=' ...')}." for n, run in found.items()}
    details = [problems[name] for names in broken.values() for name in names]
    details += [f"Equal: {agree}."] if broken and equal else []
    details += _tell_closeness(equal) + _tell_excused(equal) + _tell_skipped(comparison.strategies)
    details += [problems[name] for name in states["not possible"]]
    headline = f"{headline[0].upper()}{headline[1:]}."
    return Verdict(comparison.ok and held and not broken, headline, details)


def _tell_closeness(equal: Mapping[str, Parity]) -> list[str]:
    """Tell the greatest differences of the runs that held."""
    found = {
        "loss": [p.max_loss_diff for p in equal.values() if p.max_loss_diff is not None],
        "weights": [p.max_weight_diff for p in equal.values() if p.max_weight_diff is not None],
    }
    most = [f"{format_diff(max(diffs))} in the {what}" for what, diffs in found.items() if diffs]
    return [f"They differ by at most {', '.join(most)}."] if most else []


def _tell_excused(equal: Mapping[str, Parity]) -> list[str]:
    """Tell in one sentence of all runs with something excused, since the reason is the same."""
    found = {name: parity.excused for name, parity in equal.items() if parity.excused}
    if not found:
        return []
    counts = [len(entries) for entries in found.values()]
    low, high = min(counts), max(counts)
    places = f"{low} to {high} places" if low < high else f"{high} place{'s' * (high > 1)}"
    each = " each" if len(found) > 1 else ""
    worst = max((e for entries in found.values() for e in entries), key=lambda e: e["difference"])
    return [
        f"{', '.join(found)} exceeded the tolerance at {places}{each}, excused since a control, "
        "the reference with its batches summed in another order, differs there by a quarter as "
        f"much or more; the greatest: {format_excused(worst)}."
    ]


def _tell_skipped(runs: Mapping[str, Record]) -> list[str]:
    """Tell how many steps each run skipped, if any run did."""
    skipped = {name: sum(step.skipped for step in run.steps) for name, run in runs.items()}
    if not any(skipped.values()):
        return []
    shares = group_names((n, f"{skipped[n]} of {len(r.steps)}") for n, r in runs.items() if r.steps)
    parts = [f"{share} under {names}" for share, names in shares.items()]
    return [f"Steps skipped, since gradients overflowed in fp16: {'; '.join(parts)}."]


def format_excused(found: Mapping[str, Any]) -> str:
    """Format an entry of `Parity.excused`: 'loss at step 25, difference 3e-6, control 1e-6'."""
    when = "the end" if found["step"] is None else f"step {found['step']}"
    sizes = [f"{key} {format_diff(found[key])}" for key in ("difference", "control")]
    return f"{found['quantity']} at {when}, {', '.join(sizes)}"
