"""Finds a reference that does not repeat its own bits, from further runs of it. Starts no run.

A run on one machine gives the same bits each time. Where it does not, as by MKL's first vector call
(pytorch#188792), a third run decides which one was off. A majority of strategies never decides."""

import dataclasses
from collections.abc import Callable, Mapping

from ..records import Record, ReferenceFault
from .differences import Found, Run, differences
from .parity import Rule
from .tolerances import TOLERANCES

AGAIN, THIRD = "_again", "_third"  # after the label of a run: its second and its third run
NO_TOLERANCE = dict.fromkeys(TOLERANCES["fp32"], 0.0)
Load = Callable[[str], Run]


@dataclasses.dataclass(frozen=True)
class Trusted:
    """Says which run of a reference can be trusted.

    label: that run's; None where none is known. missing: the label of a run that is needed first.
    fault: where a run was off."""

    label: str | None = None
    missing: str | None = None
    fault: ReferenceFault | None = None


def same_bits(one: Run, other: Run) -> bool:
    """Tell whether two runs gave the same losses, norms, weights and evaluation, bit by bit."""
    return not differences(one, other, NO_TOLERANCE)


def repeats_its_bits(label: str, known: Mapping[str, Record], load: Load) -> bool:
    """Tell whether the second run of a label gave the bits of the first."""
    again = f"{label}{AGAIN}"
    return known[again].status == "ok" and same_bits(load(again), load(label))


def find_trusted(label: str, known: Mapping[str, Record], load: Load, rule: Rule) -> Trusted:
    """Return which run of the reference `label` can be trusted, or the run that is needed first.

    A run that failed counts as off. Where bits of three runs differ, as atomic additions of a GPU
    make them differ, runs within the rule's tolerance agree."""
    again, third = f"{label}{AGAIN}", f"{label}{THIRD}"
    if again not in known:
        return Trusted(missing=again)
    if repeats_its_bits(label, known, load):
        return Trusted(label)
    if third not in known:
        return Trusted(missing=third)
    runs = {name: load(name) for name in (label, again, third) if known[name].status == "ok"}
    for agree in (same_bits, lambda a, b: not differences(a, b, rule.tolerance, rule.floor)):
        friends = {n: [m for m in runs if m != n and agree(runs[n], runs[m])] for n in runs}
        for name, others in friends.items():
            if len(others) == 2:
                return Trusted(name)
            if others:
                off = next(n for n in (label, again, third) if n not in (name, *others))
                return Trusted(name, fault=_fault([off], runs.get(off), runs[name]))
    first = runs.get(label)
    return Trusted(fault=_fault([label, again, third], runs.get(again), first))


def _fault(off: list[str], run: Run | None, healthy: Run | None) -> ReferenceFault:
    """Describe where a run of the reference was off."""
    found: list[Found] = differences(run, healthy, NO_TOLERANCE) if run and healthy else []
    if not found:
        return ReferenceFault(None, "status", None, off)
    return ReferenceFault(found[0].step, found[0].title, found[0].size, off)
