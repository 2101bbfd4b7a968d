"""This module says in sentences what a comparison found, in the order in which a reader asks.

All text is plain; each output format escapes it."""

from collections.abc import Iterable, Mapping
from textwrap import shorten
from typing import NamedTuple

from ..records import PROXY, Comparison, Parity
from .excuses import explain_size, find_excuse, tell_excused, tell_kinks, tell_refused
from .formats import count, format_diff, group_names
from .notes import tell_progress, tell_references, tell_skipped, tell_variants, tell_warnings
from .resumed import tell_resumed
from .standing import AT_PROXY, BROKEN, STATES, Standing, standings, tell_problems

LONGEST = 400  # characters of a problem, whose whole text is with the receipt
SHOWN_PROBLEMS = 3  # above the table, so that it stays in sight; the others are told below it


class Verdict(NamedTuple):
    """Holds what a comparison found.

    The `headline` is one sentence. `details` are what a reader asks next, above the costs, and
    `notes` explain what stands in the table, below it. `tone` is 'good', 'bad' or 'warning'."""

    ok: bool
    headline: str
    details: list[str]
    notes: list[str]
    tone: str


def verdict(comparison: Comparison) -> Verdict:
    """Say what went wrong first, then which runs agree and how closely."""
    found, reference = standings(comparison), comparison.reference
    states = {s: [one for one in found.values() if one.state == s] for s in STATES}
    broken = [one for state in BROKEN for one in states[state]]
    held = reference == PROXY or (reference in found and not found[reference].reason)
    ok = comparison.ok and held and not broken
    passed = [*states["equal"], *states[AT_PROXY]]
    equal = {one.name: comparison.parity[one.name] for one in passed}
    agree = _tell_agreement(equal)
    problems = [_shorten(text) for text in tell_problems(broken)]
    headline = _make_headline(comparison, states, ok, agree)
    details = problems[:SHOWN_PROBLEMS]
    if more := len(problems) - SHOWN_PROBLEMS if len(problems) > SHOWN_PROBLEMS else 0:
        details.append(f"Below the table: {count(more, 'further problem')}.")
    details += tell_fault(comparison, ok)
    if agree and agree not in headline:
        details.append(f"{'' if ok else 'Equal: '}{agree}.")
    details += _tell_closeness(equal)
    notes = [*problems[SHOWN_PROBLEMS:], *tell_excused(equal), *tell_kinks(equal)]
    notes += tell_refused(equal) + tell_skipped(comparison.strategies)
    notes += tell_resumed(comparison.strategies)
    notes += tell_references(comparison) + tell_progress(comparison) + tell_variants(comparison)
    notes += [f"{text}." for text in tell_problems(states["not possible"])]
    notes += tell_warnings(comparison.strategies)
    return Verdict(ok, headline, details, notes, _find_tone(comparison, broken, ok))


def _shorten(text: str) -> str:
    short = shorten(text, LONGEST, placeholder=" ...")
    return short if short.endswith("...") else f"{short}."


def _find_tone(comparison: Comparison, broken: list[Standing], ok: bool) -> str:
    """Return 'warning' where nothing is known to be wrong, and yet not all is well."""
    if ok:
        return "warning" if comparison.reference_fault else "good"
    open_states = {"not decided", "not compared"}
    return "warning" if broken and {one.state for one in broken} <= open_states else "bad"


def _tell_agreement(equal: Mapping[str, Parity]) -> str:
    pairs = group_names((name, parity.reference) for name, parity in equal.items())
    return "; ".join(
        f"{names} {AT_PROXY}" if other == PROXY else f"{names} computed what {other} did"
        for other, names in pairs.items()
    )


def _make_headline(
    comparison: Comparison, states: Mapping[str, list[Standing]], ok: bool, agree: str
) -> str:
    """Say the verdict in one sentence, with the number of the runs that it is true of."""
    reference, equal = comparison.reference, len(states["equal"]) + len(states[AT_PROXY])
    how = AT_PROXY if states[AT_PROXY] else "equal"
    broken = [one for state in BROKEN for one in states[state]]
    tried, impossible = equal + len(broken), len(states["not possible"])
    left_out = f", {impossible} not possible here" if impossible else ""
    if missing := _find_lost_reference(comparison, broken):
        others = [one for one in broken if one.name != reference and one.state == "failed"]
        failed = "; ".join(_tell_states("failed", others))
        return f"Not compared: the reference {reference} {missing}{failed and f'; {failed}'}."
    if broken:
        parts = [text for state in BROKEN for text in _tell_states(state, states[state])]
        share = [f"{equal or 'none'} of {tried} strategies {how}{left_out}"] if tried > 1 else []
        text = "; ".join(parts + share) + ("" if share else left_out)
    elif not ok:
        text = "not equal: the comparison did not hold; compare.json has the figures"
    elif equal == 0:
        text = f"nothing compared: only {reference} ran{left_out}"
    elif equal == 1:
        text = f"{'' if states[AT_PROXY] else 'equal: '}{agree}{left_out}"
    else:
        text = f"{'both' if equal == 2 else f'all {equal}'} strategies {how}{left_out}"
    fault = "; the reference is not reproducible on this machine"
    text += fault if comparison.reference_fault and ok else ""
    return f"{text[0].upper()}{text[1:]}."


def _find_lost_reference(comparison: Comparison, broken: Iterable[Standing]) -> str:
    """Say what became of a reference that nothing can be compared with; empty where all is well."""
    run = comparison.strategies.get(comparison.reference)
    if run is None:
        return "" if comparison.reference == PROXY else "is missing"
    if run.status == "not_possible":
        return "is not possible here"
    states = {one.name: one.state for one in broken}
    state = states.get(comparison.reference, "")
    ends = {
        "failed": "failed",
        "not compared": "was interrupted",
        "not proved": "is not proved to be what was asked for",
    }
    return "did not finish" if run.status == "running" else ends.get(state, "")


def _tell_states(state: str, found: Iterable[Standing]) -> list[str]:
    """Name the runs in a state, those that left their reference in one place together."""
    places = group_names((one.name, one.where) for one in found)
    parts = [f"{names} {where}".strip() for where, names in places.items()]
    return [f"{state}: {', '.join(parts)}"] if parts else []


def tell_fault(comparison: Comparison, ok: bool) -> list[str]:
    """Say which run of the reference was off, where, by how much, and in which part of the run.

    Where all else is well the headline says already that it is not reproducible."""
    fault = comparison.reference_fault
    if fault is None:
        return []
    start = fault.step == 0 or fault.quantity.startswith("initial weights")
    place = "after the last step" if fault.step is None else f"at step {fault.step}"
    size = "" if fault.size is None else f", by {format_diff(fault.size)} of its value"
    where = (
        f"first {place} in {fault.quantity}{size}: "
        f"{'at start-up' if start else 'later in the run, not at start-up'}."
    )
    names = ", ".join(fault.runs)
    if fault.quantity == "status":
        told = f"Of its runs {names} failed."
    elif len(fault.runs) > 2:
        told = f"No two of its runs {names} agree; they differ {where}"
    else:
        told = f"Of its runs {names} {'was' if len(fault.runs) == 1 else 'were'} off, {where}"
    what = f"reference {comparison.reference} does not repeat its own result. {told}"
    return [f"The {what}" if ok else f"Not reproducible on this machine: the {what}"]


def _tell_closeness(equal: Mapping[str, Parity]) -> list[str]:
    """Tell the greatest differences of the runs that held, and why large ones passed."""
    sizes = {
        "loss": {name: parity.max_loss_diff for name, parity in equal.items()},
        "weights": {name: parity.max_weight_diff for name, parity in equal.items()},
    }
    most = []
    for what, of_runs in sizes.items():
        found = {name: size for name, size in of_runs.items() if size is not None}
        if found:
            name = max(found, key=lambda n: found[n])
            reason = _explain_greatest(name, equal[name], what, found[name])
            most.append(f"{format_diff(found[name])} in the {what}{reason}")
    proxy = any(parity.reference == PROXY for parity in equal.values())
    where = ", at the proxy size" if proxy else ""
    return [f"They differ by at most {', '.join(most)}{where}."] if most else []


def _explain_greatest(name: str, parity: Parity, what: str, size: float) -> str:
    short, excuse = explain_size(parity, what, size), find_excuse(parity, what)
    if not short.startswith("rounding") or excuse is None:
        return f" ({short})" if short else ""
    place = excuse["quantity"] if what == "weights" else f"step {excuse['step']}"
    moved = format_diff(excuse["control"])
    return f" ({name}, {place}: excused, since rounding moves this by {moved})"
