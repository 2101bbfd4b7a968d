"""Decides whether two runs computed the same, and finds where they part and why. Starts no run.

It compares steps in order, and quantities in the order of `_differences`, and names the first one
past its tolerance. Where rounding alone may have grown past the tolerance, control runs (the
reference with its batches summed in other orders) show how far rounding moves that place."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..records import Difference, EvalResult, Parity, Record
from .causes import likely_cause
from .tolerances import EXACT_STEPS, TOLERANCES

SHARE_OF_CONTROL = 0.25  # a control must differ by at least this part of a difference to excuse it
SAME_START = 1e-9  # float64 projections of equal fp32 weights, summed in another order
ROUNDED = ("loss", "grad_norm", "weights", "eval loss", "eval correct")  # what rounding can move
Arrays = Mapping[str, Any]  # numpy arrays by name


@dataclasses.dataclass(frozen=True)
class Run:
    """Holds a record and its final weights, as numpy arrays by name."""

    record: Record
    weights: Arrays


def relative(got: float | None, expected: float | None) -> float:
    """Return |a-b|/|b|, 0 where both are equal, infinity where one is missing or NaN."""
    if got == expected:
        return 0.0
    if got is None or expected is None:
        return math.inf
    size = abs(got - expected) / abs(expected) if expected else math.inf
    return math.inf if math.isnan(size) else size


def weight_difference(got: Arrays, expected: Arrays) -> tuple[float, str]:
    """Return the worst relative difference of a tensor, by its greatest magnitude, and its name."""
    if got.keys() != expected.keys():
        return math.inf, min(got.keys() ^ expected.keys())
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
    """Return the verdict on `run` against `reference`, which is called `name` in the comparison.

    factors: the numbers by which a wrong scale would be off, by their names (micro-batches, ...).
    exact_steps: the number of first steps in which no control excuses a difference."""
    noise = _noise(reference, controls if len(reference.record.steps) > exact_steps else ())
    first, excused = None, list[dict[str, Any]]()
    for found in _differences(run, reference, tolerance):
        early = found.step is not None and found.step < exact_steps
        control = None if early else noise.get(found.place)
        if control is None or not control >= SHARE_OF_CONTROL * found.size < math.inf:
            cause = likely_cause(run.record, reference.record, found.quantity, factors, exact_steps)
            got, expected = _writable(found.got), _writable(found.expected)
            first = Difference(found.step, found.quantity, got, expected, cause)
            break
        sizes = {"difference": found.size, "control": control}
        excused.append({"step": found.step, "quantity": found.quantity} | sizes)
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
        state="equal" if first is None else "not_equal",
    )


def _writable(value: Any) -> Any:
    """Return a value as JSON can hold it: NaN and infinity as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _greatest(values: Iterable[float]) -> float | None:
    """Return the greatest difference; None where there are none, or one is infinite."""
    worst = max(values, default=math.inf)
    return worst if math.isfinite(worst) else None


@dataclasses.dataclass(frozen=True)
class _Found:
    """Holds one difference; `size` is relative, or a share of all targets for `eval correct`."""

    step: int | None
    quantity: str
    got: Any
    expected: Any
    size: float

    @property
    def place(self) -> tuple[int | None, str]:
        """Return the step and the quantity without a tensor's name."""
        return self.step, self.quantity.partition(" of ")[0]


def _differences(run: Run, reference: Run, tolerance: Mapping[str, float]) -> list[_Found]:
    """List everything past its tolerance, in the order in which it happened."""
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
        _Found(0, f"initial weights of {name}", mine.get(name), value, math.inf)
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
        found.append(_Found(None, "eval samples", got.samples, expected.samples, math.inf))
    size = relative(got.loss, expected.loss)
    if size > tolerance["eval_loss"]:
        found.append(_Found(None, "eval loss", got.loss, expected.loss, size))
    away = _correct_difference(got, expected)
    if away > tolerance["correct"] or (got.correct is None) != (expected.correct is None):
        found.append(_Found(None, "eval correct", got.correct, expected.correct, away))
    return found


def _correct_difference(got: EvalResult, expected: EvalResult) -> float:
    """Return the difference in the numbers of correct predictions, as a share of all targets."""
    total = expected.targets or expected.samples
    return abs((got.correct or 0) - (expected.correct or 0)) / total


def _noise(reference: Run, controls: Sequence[Run]) -> dict[tuple[int | None, str], float]:
    """Return how far the controls differ from the reference, by step and quantity.
    Rounding cannot explain a difference in a place that is not in the result."""
    nothing = dict.fromkeys(TOLERANCES["fp32"], -1.0)  # tolerated: a difference of 0 is listed too
    noise: dict[tuple[int | None, str], float] = {}
    for found in (f for c in controls for f in _differences(c, reference, nothing)):
        if found.place[1] in ROUNDED:
            noise[found.place] = max(found.size, noise.get(found.place, 0.0))
    return noise
