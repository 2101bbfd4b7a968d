"""Lists where two runs differ by more than a tolerance, in the order in which it happened."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..records import EvalResult, Record

SAME_START = 1e-9  # float64 projections of equal fp32 weights, summed in another order
STEP_QUANTITIES = ("samples", "sample_digest", "lr", "loss", "grad_norm")
SHARE_OF_FIRST_LOSS = 0.25  # a smaller loss is compared on the scale of this part of the first one
SAME_NUMBER = 1e-12  # relative; of learning rates, which every run computes alike
Arrays = Mapping[str, Any]  # numpy arrays by name


class SavedWeights(Mapping[str, Any]):
    """Reads the tensors of a file as numpy arrays, one at a time: it holds the last one alone.

    The controls of a comparison are models too: five would not fit where one only just does."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, "numpy")
        self._names = list(self._file.keys())
        self._last: tuple[str, Any] = "", None

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        if self._last[1] is None or self._last[0] != name:
            self._last = name, None  # else two are held while the next one is read
            self._last = name, self._file.get_tensor(name)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclasses.dataclass(frozen=True)
class Run:
    """Holds a record and its final weights, as numpy arrays by name."""

    record: Record
    weights: Arrays


@dataclasses.dataclass(frozen=True)
class Found:
    """Holds one difference; `size` is relative, or a share of all targets for `eval correct`.

    step: None after the last one. tensor: the name, where the quantity is of one tensor. elements:
    how many of a tensor's are past the tolerance."""

    step: int | None
    quantity: str
    got: Any
    expected: Any
    size: float
    tensor: str | None = None
    elements: int = 0

    @property
    def title(self) -> str:
        """Return the quantity with the name of its tensor."""
        return f"{self.quantity} of {self.tensor}" if self.tensor else self.quantity


def find_lost_step(record: Record) -> str | None:
    """Say which step a record lacks: a resumed run has those before it from `steps.jsonl` alone.

    None: it has all from 0 on. A run without some of its steps is not compared, since what was
    lost are the steps in which most faults show."""
    numbers = [step.step for step in record.steps]
    lost = next((n for n, number in enumerate(numbers) if n != number), None)
    if lost is None and record.resumed_from and record.resumed_from.step > len(numbers):
        lost = len(numbers)
    if lost is None:
        return None
    return f"its record lacks step {lost}: the steps.jsonl of before it was resumed is lost"


def relative(got: float | None, expected: float | None) -> float:
    """Return |a-b|/|b|, 0 where both are equal or NaN, infinity where one is missing or NaN."""
    if got == expected:
        return 0.0
    if got is None or expected is None:
        return math.inf
    if math.isnan(got) and math.isnan(expected):  # steps without an update, by [guard]
        return 0.0
    size = abs(got - expected) / abs(expected) if expected else math.inf
    return math.inf if math.isnan(size) else size


def scale_at(quantity: str, expected: float, first_loss: float) -> float:
    """Return what a difference in a number is relative to: itself, or a part of the first loss.

    A loss is a difference of logits, which do not shrink with it: that is what is rounded."""
    floor = SHARE_OF_FIRST_LOSS * abs(first_loss) if quantity.endswith("loss") else 0.0
    return max(abs(expected), floor)


def _size(quantity: str, got: Any, expected: Any, first_loss: float) -> float:
    """Return the size of a difference between two numbers or texts."""
    if isinstance(got, str):
        return float(got != expected)
    size = relative(got, expected)
    if not 0 < size < math.inf:
        return size
    return abs(got - expected) / scale_at(quantity, expected, first_loss)


def greatest(values: Iterable[float]) -> float | None:
    """Return the greatest difference; None where there are none, or one is infinite."""
    worst = max(values, default=math.inf)
    return worst if math.isfinite(worst) else None


def scale_of(tensor: Any, floor: float) -> float:
    """Return what differences in a tensor are relative to: its greatest magnitude, or `floor`.

    Elements that are not finite, such as those of an attention mask, have no part in it."""
    import numpy

    most = float(numpy.max(abs(tensor), initial=0.0))
    if not math.isfinite(most):
        finite = numpy.isfinite(tensor)
        most = float(numpy.max(abs(tensor), initial=0.0, where=finite))
    return max(most, floor)


def elements_apart(one: Any, other: Any) -> Any:
    """Return |a-b| of two float64 tensors of one shape, element by element.

    Two elements that are the same infinity, or both NaN, are not apart. Where one of them alone is
    not finite, or both are infinite with other signs, they are apart by infinity."""
    import numpy

    with numpy.errstate(invalid="ignore"):
        apart = abs(one - other)
    if not numpy.isfinite(numpy.max(apart, initial=0.0)):
        same = (one == other) | (numpy.isnan(one) & numpy.isnan(other))
        apart = numpy.where(same, 0.0, numpy.where(numpy.isfinite(apart), apart, math.inf))
    return apart


def weight_differences(
    got: Arrays, expected: Arrays, floor: float = 0.0, tolerance: float = 0.0
) -> list[Found]:
    """Compare final weights tensor by tensor, and list every difference, the greatest first.

    A size is the greatest |a-b| of a tensor over `scale_of` it. Those up to the tolerance are left
    out."""
    found = []
    for name in sorted(got.keys() | expected.keys()):
        if name not in got or name not in expected or got[name].shape != expected[name].shape:
            mine, theirs = (
                str(list(w[name].shape)) if name in w else None for w in (got, expected)
            )
            found.append(Found(None, "weights", mine, theirs, math.inf, name))
            continue
        mine, theirs = got[name].astype("float64"), expected[name].astype("float64")
        apart = elements_apart(mine, theirs)
        if not apart.any():  # a tensor without elements does not differ
            continue
        place = int(apart.argmax())
        away, scale = float(apart.flat[place]), scale_of(theirs, floor)
        size, got_value = relative(scale + away, scale), float(mine.flat[place])
        if size > tolerance:
            elements = int((apart > tolerance * scale).sum())
            value = float(theirs.flat[place])
            found.append(Found(None, "weights", got_value, value, size, name, elements))
    return sorted(found, key=lambda one: -one.size)


def differences(
    run: Run, reference: Run, tolerance: Mapping[str, float], floor: float = 0.0
) -> list[Found]:
    """List everything past its tolerance, in the order in which it happened.

    floor: see `scale_of`."""
    found = _start_differences(run.record, reference.record)
    for got, expected in zip(run.record.steps, reference.record.steps, strict=False):
        for quantity in STEP_QUANTITIES:
            a, b = getattr(got, quantity), getattr(expected, quantity)
            size = _size(quantity, a, b, reference.record.steps[0].loss)
            if size > tolerance.get(quantity, SAME_NUMBER):
                found.append(Found(got.step, quantity, a, b, size))
    if len(run.record.steps) != len(reference.record.steps):
        counts = len(run.record.steps), len(reference.record.steps)
        found.append(Found(min(counts), "steps", *counts, math.inf))
    found += weight_differences(run.weights, reference.weights, floor, tolerance["weights"])
    return found + _eval_differences(run.record, reference.record, tolerance)


def _start_differences(run: Record, reference: Record) -> list[Found]:
    if run.weights is None or reference.weights is None:
        return []
    mine, theirs = run.weights.initial, reference.weights.initial
    return [
        Found(0, "initial weights", mine.get(name), value, math.inf, name)
        for name, value in theirs.items()
        if name not in mine or relative(mine[name], value) > SAME_START
    ]


def _eval_differences(
    run: Record, reference: Record, tolerance: Mapping[str, float]
) -> list[Found]:
    got, expected = run.eval, reference.eval
    if expected is None:
        return []
    if got is None:
        return [Found(None, "eval", None, expected.loss, math.inf)]
    found = []
    if got.samples != expected.samples:
        found.append(Found(None, "eval samples", got.samples, expected.samples, math.inf))
    first = reference.steps[0].loss if reference.steps else 0.0
    both_nan = math.isnan(got.loss) and math.isnan(expected.loss)
    size = 0.0 if both_nan else _size("eval loss", got.loss, expected.loss, first)
    if size > tolerance["eval_loss"]:
        found.append(Found(None, "eval loss", got.loss, expected.loss, size))
    away = share_apart(got, expected)
    if away > tolerance["correct"] or (got.correct is None) != (expected.correct is None):
        found.append(Found(None, "eval correct", got.correct, expected.correct, away))
    return found + [
        Found(None, "eval metric", got.metrics.get(name), value, size, name)
        for name, value in expected.metrics.items()
        if (size := metric_apart(got.metrics.get(name), value))
        > max(tolerance["eval_loss"], tolerance["correct"])
    ]


def metric_apart(got: float | None, expected: float) -> float:
    """Return the relative difference of a metric; two that are NaN do not differ."""
    nan = got is not None and math.isnan(got) and math.isnan(expected)
    return 0.0 if nan else relative(got, expected)


def share_apart(got: EvalResult, expected: EvalResult) -> float:
    """Return the difference in the numbers of correct predictions, as a share of all targets."""
    total = expected.targets or expected.samples
    return abs((got.correct or 0) - (expected.correct or 0)) / total
