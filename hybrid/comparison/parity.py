"""Did two runs compute the same thing, and if not, where did they part and why? Reads records only.

Steps are compared in order, quantities in the order of `_step_differences`; the first one past its
tolerance is named. Where rounding alone may have grown past the tolerance, control runs (the
reference with its batches summed in other orders) say by how much rounding alone moves that step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..records import Difference, EvalResult, Parity, Record
from .causes import likely_cause
from .tolerances import EXACT_STEPS

SHARE_OF_CONTROL = 0.25  # a control must differ by at least this part of a difference to excuse it
SAME_START = 1e-9  # float64 projections of equal fp32 weights, summed in another order
Arrays = Mapping[str, Any]  # numpy arrays by name


@dataclasses.dataclass(frozen=True)
class Run:
    """A record and its final weights, as numpy arrays by name."""

    record: Record
    weights: Arrays


def relative(got: float | None, expected: float | None) -> float:
    """|a-b|/|b|, 0 where they are equal; infinite where one is missing."""
    if got == expected:
        return 0.0
    if got is None or expected is None:
        return math.inf
    size = abs(got - expected) / abs(expected) if expected else math.inf
    return math.inf if math.isnan(size) else size


def weight_difference(got: Arrays, expected: Arrays) -> tuple[float, str]:
    """The greatest difference of a tensor, over its greatest expected magnitude, and its name."""
    if got.keys() != expected.keys():
        odd = sorted(got.keys() ^ expected.keys())
        return float("inf"), odd[0]
    worst = (0.0, "")
    for name, reference in expected.items():
        if got[name].shape != reference.shape:
            return math.inf, name
        away = float(abs(got[name].astype("float64") - reference.astype("float64")).max())
        size = float(abs(reference).max())
        worst = max(worst, (relative(size + away, size), name))
    return worst


def compare_runs(
    run: Run,
    reference: Run,
    name: str,
    tolerance: Mapping[str, float],
    factors: Mapping[str, int],
    controls: Sequence[Run] = (),
    exact_steps: int = EXACT_STEPS["fp32"],
) -> Parity:
    """The verdict on `run` against `reference` (called `name` in the comparison).

    factors: what a wrong scale would be a multiple of, by its name (micro-batches, ...).
    exact_steps: how many first steps no control excuses.
    """
    first, excused = _first_unexcused(run, reference, tolerance, factors, controls, exact_steps)
    steps = list(zip(run.record.steps, reference.record.steps, strict=False))
    return Parity(
        ok=first is None,
        max_loss_diff=_greatest(relative(a.loss, b.loss) for a, b in steps),
        max_weight_diff=_greatest([weight_difference(run.weights, reference.weights)[0]]),
        tolerance=dict(tolerance),
        first_difference=first,
        reference=name,
        max_grad_norm_diff=_greatest(relative(a.grad_norm, b.grad_norm) for a, b in steps),
        excused=excused,
    )


def _first_unexcused(
    run: Run,
    reference: Run,
    tolerance: Mapping[str, float],
    factors: Mapping[str, int],
    controls: Sequence[Run],
    exact_steps: int,
) -> tuple[Difference | None, list[dict[str, Any]]]:
    """The first difference that rounding does not explain, and those before it that it does."""
    excused: list[dict[str, Any]] = []
    for found in _differences(run, reference, tolerance):
        allowed = _noise(found, reference, controls, exact_steps)
        if allowed is None or not allowed >= SHARE_OF_CONTROL * found.size < math.inf:
            cause = likely_cause(run.record, reference.record, found.quantity, factors, exact_steps)
            got, expected = _writable(found.got), _writable(found.expected)
            return Difference(found.step, found.quantity, got, expected, cause), excused
        excused.append(
            {
                "step": found.step,
                "quantity": found.quantity,
                "difference": found.size,
                "control": allowed,
            }
        )
    return None, excused


def _writable(value: Any) -> Any:
    """A value as JSON can hold it: a number that is none as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _greatest(values: Iterable[float]) -> float | None:
    """The greatest difference; None where there is none, or one is past all numbers."""
    worst = max(values, default=math.inf)
    return worst if math.isfinite(worst) else None


@dataclasses.dataclass(frozen=True)
class _Found:
    step: int | None
    quantity: str
    got: Any
    expected: Any
    size: float


def _differences(run: Run, reference: Run, tolerance: Mapping[str, float]) -> list[_Found]:
    """Everything past its tolerance, in the order in which it happened."""
    found = _start_differences(run.record, reference.record)
    for got, expected in zip(run.record.steps, reference.record.steps, strict=False):
        for quantity in ("samples", "sample_digest", "lr", "loss", "grad_norm"):
            a, b = getattr(got, quantity), getattr(expected, quantity)
            size = float(a != b) if isinstance(a, str) else relative(a, b)
            if size > tolerance.get(quantity, 1e-12):
                found.append(_Found(got.step, quantity, a, b, size))
    if len(run.record.steps) != len(reference.record.steps):
        counts = len(run.record.steps), len(reference.record.steps)
        found.append(_Found(min(counts), "steps", *counts, math.inf))
    size, name = weight_difference(run.weights, reference.weights)
    if size > tolerance["weights"]:
        found.append(_Found(None, f"weights of {name}", size, 0.0, size))
    return found + _eval_differences(run.record, reference.record, tolerance)


def _start_differences(run: Record, reference: Record) -> list[_Found]:
    if run.weights is None or reference.weights is None:
        return []
    mine, theirs = run.weights.initial, reference.weights.initial
    return [
        _Found(0, f"initial weights of {name}", mine.get(name), value, float("inf"))
        for name, value in theirs.items()
        if name not in mine or relative(mine[name], value) > SAME_START
    ]


def _eval_differences(
    run: Record, reference: Record, tolerance: Mapping[str, float]
) -> list[_Found]:
    got, expected = run.eval, reference.eval
    if expected is None:
        return []
    if got is None:
        return [_Found(None, "eval", None, expected.loss, math.inf)]
    found = []
    if got.samples != expected.samples:
        found.append(_Found(None, "eval samples", got.samples, expected.samples, float("inf")))
    size = relative(got.loss, expected.loss)
    if size > tolerance["eval_loss"]:
        found.append(_Found(None, "eval loss", got.loss, expected.loss, size))
    away = _correct_difference(got, expected)
    if away > tolerance["correct"] or (got.correct is None) != (expected.correct is None):
        found.append(_Found(None, "eval correct", got.correct, expected.correct, away))
    return found


def _correct_difference(got: EvalResult, expected: EvalResult) -> float:
    """Targets predicted right by one and not by the other, at least, as a share of all."""
    total = expected.targets or expected.samples
    return abs((got.correct or 0) - (expected.correct or 0)) / total


def _noise(
    found: _Found, reference: Run, controls: Sequence[Run], exact_steps: int
) -> float | None:
    """By how much the controls differ from the reference in the same place; None where rounding
    cannot be the reason."""
    early = found.step is not None and found.step < exact_steps
    if early or not controls or len(reference.record.steps) <= exact_steps:
        return None
    if found.quantity in ("loss", "grad_norm") and found.step is not None:
        at = found.step
        expected = getattr(reference.record.steps[at], found.quantity)
        return max(
            relative(getattr(c.record.steps[at], found.quantity), expected) for c in controls
        )
    if found.quantity.startswith("weights of "):
        return max(weight_difference(c.weights, reference.weights)[0] for c in controls)
    evals = [(c.record.eval, reference.record.eval) for c in controls]
    if found.quantity == "eval loss":
        return max(relative(c.loss, r.loss) for c, r in evals if c and r)
    if found.quantity == "eval correct":
        return max(_correct_difference(c, r) for c, r in evals if c and r)
    return None
