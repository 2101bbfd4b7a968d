"""This module says how far each run may be trusted: parity comes before speed.

`standings` says it for each run in a word, and `tell_problems` in sentences, of which each stands
for all runs that share it. All text is plain; each output format escapes it."""

from collections.abc import Iterable
from typing import NamedTuple

from ..records import INTERRUPTED, PROXY, Comparison, Parity, Record

BROKEN = ("not equal", "failed", "not proved", "not decided", "not compared")  # the gravest first
AT_PROXY = "equal at the proxy size"  # by a small job that was compared in place of this one
STATES = (*BROKEN, "equal", AT_PROXY, "not possible")
VERBS = {  # of one run and of several
    "not equal": ("leaves", "leave"),
    "failed": ("failed:", "failed:"),
    "not proved": ("is not proved to be what was asked for:",) * 2,
    "not decided": ("is not decided:", "are not decided:"),
    "not compared": ("was not compared:", "were not compared:"),
    "not possible": ("is not possible here:", "are not possible here:"),
}


class Standing(NamedTuple):
    """Says in a word or two how far a run may be trusted.

    No cost is shown for a run with a `reason`, which continues one of `VERBS`. The headline quotes
    `where`, the place at which the run left its reference. Runs with the same `state` and `alike`
    went wrong in the same way."""

    name: str
    state: str
    reason: str = ""
    where: str = ""
    alike: str = ""

    @property
    def problem(self) -> str:
        """Return the reason as a sentence without its full stop; empty where there is none."""
        return f"{self.name} {VERBS[self.state][0]} {self.reason}" if self.reason else ""


def standings(comparison: Comparison) -> dict[str, Standing]:
    """Return the standing of every strategy, in the comparison's order."""
    return {name: _standing_of(comparison, name) for name in comparison.strategies}


def trusted_runs(comparison: Comparison) -> dict[str, Record]:
    """Return the runs without a problem, the only ones whose costs may be shown."""
    found = standings(comparison)
    return {name: run for name, run in comparison.strategies.items() if not found[name].reason}


def tell_problems(found: Iterable[Standing]) -> list[str]:
    """Return a sentence for each way in which runs went wrong, with the names of these runs."""
    groups: dict[tuple[str, str], list[Standing]] = {}
    for one in found:
        groups.setdefault((one.state, one.alike or one.reason), []).append(one)
    told = []
    for (state, _), (first, *others) in groups.items():
        names = ", ".join([first.name, *(one.name for one in others)])
        same = all(one.reason == first.reason for one in others)
        figures = "" if same else f" (the figures are those of {first.name})"
        told.append(f"{names} {VERBS[state][bool(others)]} {first.reason}{figures}")
    return told


def _standing_of(comparison: Comparison, name: str) -> Standing:
    record, parity = comparison.strategies[name], comparison.parity.get(name)
    if record.status == "running":
        return Standing(name, "failed", "it did not finish")
    if record.status == "failed" and record.reason == INTERRUPTED:
        return Standing(name, "not compared", INTERRUPTED)
    if record.status != "ok":
        return Standing(
            name, record.status.replace("_", " "), record.reason or "no reason was recorded"
        )
    if record.receipt is None or not record.receipt.engaged:
        why = record.receipt.reason if record.receipt else "it left no receipt"
        return Standing(name, "not proved", why or "see its receipt")
    if name == comparison.reference:
        return Standing(name, "reference")
    if parity and parity.ok:
        return Standing(name, AT_PROXY if parity.reference == PROXY else "equal")
    if parity and parity.state == "not_decided":
        why = f"no run of the reference {parity.reference} can be trusted"
        return Standing(name, "not decided", why)
    if parity and (parity.first_difference or parity.state == "not_equal"):
        return _describe_difference(name, parity)
    return Standing(name, "not compared", _find_missing(comparison, name))


def _find_missing(comparison: Comparison, name: str) -> str:
    """Say why there is no verdict on a run that ended well.

    What became of the reference is not repeated here, since its own problem tells it."""
    reference, parity = comparison.strategies.get(comparison.reference), comparison.parity.get(name)
    if comparison.reference != PROXY and (reference is None or reference.status != "ok"):
        status = reference.status if reference else "missing"
        ends = {"failed": "failed", "running": "did not finish", "missing": "is missing"}
        how = ends.get(status, "is not possible here")
        return f"the reference {comparison.reference} {how}"
    for label, run in comparison.controls.items():
        if label.startswith(f"{name}_") and run.status != "ok":
            return f"its reference {label} failed: {run.reason or 'no reason was recorded'}"
    return (parity and parity.reason) or "no verdict was recorded"


def _describe_difference(name: str, parity: Parity) -> Standing:
    """Say where `name` left its reference: step, quantity, both values and the likely cause."""
    found = parity.first_difference
    if found is None:
        return Standing(name, "not equal", f"{parity.reference}, nobody knows where")
    at = "" if found.step is None else f"step {found.step}"
    values = (found.got, found.expected)
    got, expected = (f"{v:.9g}" if isinstance(v, float) else str(v) for v in values)
    cause = f"; likely cause: {found.likely_cause}" if found.likely_cause else ""
    place = f"{parity.reference}{at and f' at {at}'} in {found.quantity}"
    reason = f"{place}: got {got}, expected {expected}{cause}"
    where = f"{at and f'from {at} '}({found.quantity})"
    return Standing(name, "not equal", reason, where, place + cause)
