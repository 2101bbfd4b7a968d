"""Decides whether two runs computed the same, and finds where they part and why. Starts no run.

It compares steps in order, and quantities in the order of `differences`, and names the first one
past its tolerance. Where rounding alone may have grown past the tolerance, control runs (the
reference with its batches summed in other orders) show how far rounding moves that place."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from ..records import Difference, Parity
from .causes import Facts, likely_cause
from .differences import Found, Run, differences, greatest, relative, weight_differences
from .noise import Excuse, Noise


@dataclasses.dataclass(frozen=True)
class Rule:
    """Says by how much two runs of one job may differ.

    tolerance: relative, by quantity. exact_steps: in these first steps nothing excuses a
    difference. floor: differences in a tensor of smaller magnitude are relative to this one. facts:
    what is known of the job, by which a cause is found."""

    tolerance: Mapping[str, float]
    exact_steps: int
    floor: float = 0.0
    facts: Facts = dataclasses.field(default_factory=Facts)


def compare_runs(
    run: Run,
    reference: Run,
    name: str,
    rule: Rule,
    controls: Mapping[str, Run] | None = None,
    repeated: Collection[str] = (),
) -> Parity:
    """Return the verdict on `run` against `reference`, which is called `name` in the comparison.

    controls: the reference in other summing orders, by their labels. repeated: the labels of those
    that were run once more and repeated their bits. What one control alone excuses, it must repeat.
    """
    noise = Noise(reference, controls or {}, rule.tolerance, rule.exact_steps, rule.floor)
    first, excused = None, list[tuple[Found, Excuse]]()
    for found in differences(run, reference, rule.tolerance, rule.floor):
        excuse = noise.excuse(found)
        if excuse is None or not set(excuse.words_of) <= set(repeated):
            first = found
            break
        excused.append((found, excuse))
    steps = list(zip(run.record.steps, reference.record.steps, strict=False))
    weights = weight_differences(run.weights, reference.weights, rule.floor)
    return Parity(
        ok=first is None,
        max_loss_diff=greatest(relative(a.loss, b.loss) for a, b in steps),
        max_weight_diff=greatest(one.size for one in weights) if weights else 0.0,
        tolerance=dict(rule.tolerance),
        first_difference=_describe(first, run, reference, name, noise, rule) if first else None,
        reference=name,
        max_grad_norm_diff=greatest(relative(a.grad_norm, b.grad_norm) for a, b in steps),
        excused=_list_excused(excused),
        state="equal" if first is None else "not_equal",
        refused=noise.refused,
    )


def words_needed(
    run: Run, reference: Run, rule: Rule, controls: Mapping[str, Run]
) -> tuple[str, ...]:
    """Return the labels of the controls whose word alone excuses a difference.

    There are none where something is left that no control excuses."""
    noise = Noise(reference, controls, rule.tolerance, rule.exact_steps, rule.floor)
    found = [
        excuse.words_of if (excuse := noise.excuse(one)) else None
        for one in differences(run, reference, rule.tolerance, rule.floor)
    ]
    if None in found:
        return ()  # nothing that they repeat would make the runs equal
    return tuple(dict.fromkeys(label for labels in found for label in labels or ()))


def _describe(
    found: Found, run: Run, reference: Run, name: str, noise: Noise, rule: Rule
) -> Difference:
    """Return a difference as the record of the comparison has it, with its likely cause."""
    if noise.against_reference(found):
        labels = ", ".join(noise.controls)
        cause: str | None = (
            f"{name} itself is off there: its own batches summed in other orders ({labels}) agree "
            f"with one another and with this run, and not with {name}"
        )
    else:
        cause = likely_cause(run.record, reference.record, found, rule.facts)
    values = _writable(found.got), _writable(found.expected)
    return Difference(found.step, found.title, *values, cause)


def _list_excused(excused: list[tuple[Found, Excuse]]) -> list[dict[str, Any]]:
    """List what was excused, all tensors of the final weights as one entry: that of the worst."""
    entries, tensors = [], [one for one in excused if one[0].quantity == "weights"]
    for found, excuse in excused:
        if tensors and found is not tensors[0][0] and found.quantity == "weights":
            continue
        entry: dict[str, Any] = {"step": found.step, "quantity": found.title}
        entry |= {"difference": found.size, "control": excuse.spread}
        if found.quantity == "weights":
            entry["tensors"] = len(tensors)
        if excuse.kink:
            entry["kink"] = True
        entries.append(entry)
    return entries


def _writable(value: Any) -> Any:
    """Return a value as JSON can hold it: NaN and infinity as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
