"""This module says why a run that exceeds a tolerance is equal all the same.

A difference is excused where controls, the reference with its batches summed in other orders, are
as far apart from one another in the same place, so that rounding alone explains it."""

from collections.abc import Mapping
from typing import Any

from ..records import Parity
from .formats import count, format_diff, group_names

LARGE = 1e-3  # from here on a difference that a tolerance allows is shown with that tolerance

Excuse = Mapping[str, Any]  # an entry of `Parity.excused`


def format_excused(found: Excuse) -> str:
    """Format an entry of `Parity.excused`: 'loss at step 25, difference 3e-6, control 1e-6'."""
    when = "the end" if found["step"] is None else f"step {found['step']}"
    sizes = [f"{key} {format_diff(found[key])}" for key in ("difference", "control")]
    tensors = found.get("tensors", 1)
    worst = f" (the worst of {tensors} tensors)" if tensors > 1 else ""
    return f"{found['quantity']} at {when}{worst}, {', '.join(sizes)}"


def find_excuse(parity: Parity, what: str) -> Excuse | None:
    """Return the greatest excused difference in the 'loss' or in the 'weights'."""
    entries = [e for e in parity.excused if e["quantity"].partition(" of ")[0] == what]
    return max(entries, key=lambda e: e["difference"], default=None)


def explain_size(parity: Parity, what: str, size: float | None) -> str:
    """Say why so large a difference in the 'loss' or the 'weights' passed.

    The text is empty for a run that did not pass, and for a small difference."""
    allowed = parity.tolerance.get(what)
    if not parity.ok or size is None or allowed is None:
        return ""
    if size > allowed and (excuse := find_excuse(parity, what)):
        return f"rounding {format_diff(excuse['control'])}"
    return f"allowed {format_diff(allowed)}" if LARGE < size <= allowed else ""


def tell_excused(equal: Mapping[str, Parity]) -> list[str]:
    """Tell in one sentence of all runs with something excused, since the reason is the same."""
    found = {name: parity.excused for name, parity in equal.items() if parity.excused}
    if not found:
        return []
    counts = [len(entries) for entries in found.values()]
    low, high = min(counts), max(counts)
    places = f"{low} to {high} places" if low < high else count(high, "place")
    each = " each" if len(found) > 1 else ""
    worst = max((e for entries in found.values() for e in entries), key=lambda e: e["difference"])
    return [
        f"{', '.join(found)} exceeded the tolerance at {places}{each}, excused since rounding "
        "moves these places as far: controls, which are the reference with its batches summed in "
        "other orders, are apart there by a quarter as much or more; the greatest: "
        f"{format_excused(worst)}."
    ]


def tell_kinks(equal: Mapping[str, Parity]) -> list[str]:
    """Tell where a difference came within one step, at a kink such as relu's, as controls show."""
    first = {
        name: next((e for e in parity.excused if e.get("kink")), None)
        for name, parity in equal.items()
    }
    places = [(name, (e["step"], e["quantity"])) for name, e in first.items() if e]
    return [
        f"A kink at step {step}: the {quantity} of {names} leaves the reference within one step, "
        "and controls leave one another so too. Rounding puts a value on the other side of a place "
        "where the model bends, such as relu at 0."
        for (step, quantity), names in group_names(places).items()
    ]


def tell_refused(equal: Mapping[str, Parity]) -> list[str]:
    """Name the controls that excuse nothing."""
    names = dict.fromkeys(label for parity in equal.values() for label in parity.refused)
    if not names:
        return []
    return [
        f"{', '.join(names)}: {'this control' if len(names) == 1 else 'these controls'} left the "
        "reference in steps in which rounding alone cannot, and so excused nothing."
    ]
