"""Settles which run of the reference a comparison trusts, and names a reference that is suspect."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..records import Parity, Record, ReferenceFault
from ..training.leftovers import list_run, move_run, remove, remove_empty
from .differences import Run, differences
from .parity import Rule
from .repeats import AGAIN, THIRD, Load, find_trusted

OFF = "_off"  # after the label of a reference: its run that was off


def settle(
    label: str,
    runs: dict[str, Record],
    controls: dict[str, Record],
    out: Path,
    load: Load,
    rule: Rule,
) -> ReferenceFault | None:
    """Put a run of the reference that repeats itself in the place of one that was off.

    label: of the reference, in `runs` or in `controls`. The run that was off keeps its record, and
    its folder in `out`, under the label and `_off`. Returns where it was off, None where no run of
    it was. Does nothing where the reference was not run again."""
    place = runs if label in runs else controls
    if f"{label}{AGAIN}" not in controls:
        return None
    trusted = find_trusted(label, {**controls, **runs}, load, rule)
    if not (trusted.fault and trusted.label):
        return trusted.fault
    off = f"{label}{OFF}"
    if trusted.label == label:
        _move(f"{label}{AGAIN}", controls, off, controls, out)
    else:
        _move(label, place, off, controls, out)
        _move(f"{label}{AGAIN}", controls, label, place, out)
    if f"{label}{THIRD}" in controls:
        _move(f"{label}{THIRD}", controls, f"{label}{AGAIN}", controls, out)
    return dataclasses.replace(trusted.fault, runs=[off])


def _move(
    old: str, source: dict[str, Record], new: str, target: dict[str, Record], out: Path
) -> None:
    """Give a run another label, and its folder another name."""
    target[new] = source.pop(old)
    remove(list_run(out / new))  # of an earlier comparison
    remove_empty(out / new)
    move_run(out / old, out / new)


def name_suspect(
    parity: Mapping[str, Parity],
    reference: str,
    engine_of: Callable[[str], str],
    load: Load,
    rule: Rule,
) -> dict[str, Parity]:
    """Say it where runs of different engines agree with each other, and not with the reference.

    They stay unequal: a majority never decides. engine_of: what does a strategy's work."""
    found = dict(parity)
    unequal = [n for n, p in parity.items() if p.state == "not_equal" and p.reference == reference]
    for one, other in itertools.combinations(unequal, 2):
        firsts = parity[one].first_difference, parity[other].first_difference
        if engine_of(one) == engine_of(other) or None in firsts:
            continue
        if not _agree(load(one), load(other), rule, [f.step for f in firsts if f]):
            continue
        for name, first in zip((one, other), firsts, strict=True):
            cause = (
                f"{reference} itself is suspect: {one} and {other}, of different engines, agree "
                f"with each other and not with it"
            )
            if first and "itself" not in str(first.likely_cause):
                cause = f"{first.likely_cause}; or {cause}" if first.likely_cause else cause
                named = dataclasses.replace(first, likely_cause=cause)
                found[name] = dataclasses.replace(found[name], first_difference=named)
    return found


def _agree(one: Run, other: Run, rule: Rule, steps: Sequence[int | None]) -> bool:
    """Tell whether two runs agree up to the later of these steps; None: to the very end."""
    last = math.inf if None in steps else max(step for step in steps if step is not None)
    apart = differences(one, other, rule.tolerance, rule.floor)
    return all((math.inf if found.step is None else found.step) > last for found in apart)
