"""Measures how far rounding alone moves a run, by controls: the reference in other summing orders.

The noise is the spread of the controls among themselves. The reference is not in it, since it may
be the one that is wrong."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .differences import Found, Run, differences, elements_apart, scale_at, scale_of

SHARE_OF_NOISE = 0.25  # the controls must spread by at least this part of a difference
LENIENT = 4.0  # times the tolerance: how far a control may be from the reference in the exact steps
RARE = 0.05  # of a tensor's weights, at most, can have fallen to the other side by chance
KINK = 10.0  # a spread that grows so many times in one step comes from a kink, such as relu's at 0
# What rounding can move.
ROUNDED = ("loss", "grad_norm", "weights", "eval loss", "eval correct", "eval metric")


def can_be_rounding(found: Found, exact_steps: int) -> bool:
    """Tell whether rounding could explain a difference; in the exact steps it never does."""
    early = found.step is not None and found.step < exact_steps
    return found.quantity in ROUNDED and math.isfinite(found.size) and not early


def is_near(found: Found, tolerance: Mapping[str, float]) -> bool:
    """Tell whether a control is near enough to the reference in a step where nothing excuses it."""
    near = LENIENT * tolerance.get(found.quantity, 0.0)
    return can_be_rounding(found, 0) and found.size <= near


@dataclasses.dataclass(frozen=True)
class Excuse:
    """Says that rounding explains a difference.

    spread: of the controls, relative as the difference is. kink: it came in one step. words_of: the
    controls without any one of which there would be no excuse."""

    spread: float
    kink: bool
    words_of: tuple[str, ...]


class Noise:
    """Holds the controls of one reference that agree with it in the exact steps.

    Others excuse nothing, and are in `refused`."""

    def __init__(
        self,
        reference: Run,
        controls: Mapping[str, Run],
        tolerance: Mapping[str, float],
        exact_steps: int,
        floor: float = 0.0,
    ) -> None:
        self.reference, self.exact_steps, self.floor = reference, exact_steps, floor
        self.tolerance = tolerance["weights"]
        bad = {
            name
            for name, control in controls.items()
            for found in differences(control, reference, tolerance, floor)
            if not (can_be_rounding(found, exact_steps) or is_near(found, tolerance))
        }
        self.refused = sorted(bad)
        self.controls = {name: run for name, run in controls.items() if name not in bad}
        self._by_step = functools.lru_cache(maxsize=None)(self._spreads_by_step)
        self._pooled = functools.lru_cache(maxsize=None)(self._pool)

    def excuse(self, found: Found) -> Excuse | None:
        """Return why rounding explains a difference; None where it does not."""
        if not can_be_rounding(found, self.exact_steps):
            return None
        everyone = tuple(self.controls)
        spread = self._excusing_spread(found, everyone)
        if spread is None:
            return None
        without = {name: tuple(n for n in everyone if n != name) for name in everyone}
        words_of = [n for n, rest in without.items() if self._excusing_spread(found, rest) is None]
        return Excuse(spread, self._kinks(found, everyone), tuple(words_of))

    def _excusing_spread(self, found: Found, names: tuple[str, ...]) -> float | None:
        """Return the spread of these controls, if it excuses a difference.

        A few weights of a tensor can be apart though all controls agree there. Adam moves a weight
        by its rate, whose sign is chance where the gradient is nothing but rounding: the reference
        may be the one that fell to the other side. Such weights are as rare, and as far apart, as
        they are between the controls in all tensors together."""
        needed = SHARE_OF_NOISE * found.size
        spread = self.spread(found, names)
        if needed <= spread < math.inf:
            return spread
        if found.quantity != "weights" or len(names) < 2:
            return None
        tensor = self.reference.weights[found.tensor or ""]
        farthest, share = self._pooled(names)
        spread = farthest / scale_of(tensor, self.floor)
        expected = share / SHARE_OF_NOISE * tensor.size
        few = found.elements <= min(max(1.0, expected), RARE * tensor.size)
        one = found.elements == 1 <= expected  # of a tensor so small that one is not rare
        return spread if (few or one) and needed <= spread < math.inf else None

    def _pool(self, names: tuple[str, ...]) -> tuple[float, float]:
        """Return how far two controls are apart in any weight, and the share of such weights.

        The share is of all weights, of those that are apart by more than the tolerance."""
        farthest, share, tensors = 0.0, 0.0, self.reference.weights
        total = sum(tensor.size for tensor in tensors.values())
        for one, other in itertools.combinations(names, 2):
            count = 0
            for name, tensor in tensors.items():
                mine, theirs = (self.controls[n].weights[name] for n in (one, other))
                apart = elements_apart(mine.astype("float64"), theirs.astype("float64"))
                if tensor.size:
                    farthest = max(farthest, float(apart.max()))
                count += int((apart > self.tolerance * scale_of(tensor, self.floor)).sum())
            share = max(share, count / max(1, total))
        return farthest, share

    def spread(self, found: Found, names: tuple[str, ...]) -> float:
        """Return how far these controls are apart at the place of a difference.

        At a step it is the greatest up to there, since controls can meet by chance at any one."""
        if found.step is not None:
            return max(self._by_step(found.quantity, names)[: found.step + 1], default=0.0)
        runs = [self.controls[name] for name in names]
        if found.quantity == "weights":
            name = found.tensor or ""
            tensors = [run.weights[name].astype("float64") for run in runs]
            return _spread(tensors, scale_of(self.reference.weights[name], self.floor))
        expected = self.reference.record.eval
        results = [run.record.eval for run in runs]
        if expected is None or None in results:
            return 0.0
        if found.quantity == "eval loss":
            scale = scale_at("eval loss", expected.loss, self._first_loss)
            return _spread([r.loss for r in results if r], scale)
        if found.quantity == "eval metric":
            value = expected.metrics[found.tensor or ""]
            values = [r.metrics.get(found.tensor or "", value) for r in results if r]
            return _spread(values, abs(value))
        total = expected.targets or expected.samples
        return _spread([r.correct or 0 for r in results if r], total)

    @property
    def _first_loss(self) -> float:
        steps = self.reference.record.steps
        return steps[0].loss if steps else 0.0

    def _kinks(self, found: Found, names: tuple[str, ...]) -> bool:
        """Tell whether the spread that excuses a difference at a step came within one step."""
        if found.step is None:
            return False
        spreads = self._by_step(found.quantity, names)[: found.step + 1]
        first = next(i for i, s in enumerate(spreads) if s >= SHARE_OF_NOISE * found.size)
        return first > 0 and spreads[first] > KINK * max(spreads[:first])

    def _spreads_by_step(self, quantity: str, names: tuple[str, ...]) -> list[float]:
        """Return the controls' spread at each step of the reference."""
        runs, spreads = [self.controls[name].record.steps for name in names], []
        for i, step in enumerate(self.reference.record.steps):
            values = [getattr(steps[i], quantity) for steps in runs if i < len(steps)]
            expected = getattr(step, quantity)
            usable = expected is not None and None not in values
            scale = scale_at(quantity, expected, self._first_loss) if usable else 0.0
            spreads.append(_spread(values, scale) if usable else 0.0)
        return spreads

    def against_reference(self, found: Found) -> bool:
        """Tell whether run and controls agree with one another, and not with the reference.

        Then it is the reference that is off there."""
        if found.step is None or found.quantity not in ("loss", "grad_norm"):
            return False
        records = [self.reference.record, *(run.record for run in self.controls.values())]
        expected, *values = (getattr(r.steps[found.step], found.quantity) for r in records)
        if len(values) < 2 or None in (expected, found.got, *values):
            return False
        away = min(abs(value - expected) for value in values)
        return max(abs(value - found.got) for value in values) < SHARE_OF_NOISE * away


def _spread(values: Sequence[Any], scale: float) -> float:
    """Return the greatest difference between any two values or tensors, relative to `scale`."""
    import numpy

    if len(values) < 2 or not scale:
        return 0.0
    highest = numpy.asarray(functools.reduce(numpy.maximum, values))
    lowest = numpy.asarray(functools.reduce(numpy.minimum, values))
    most = float(numpy.max(elements_apart(highest, lowest), initial=0.0))
    return most / scale if math.isfinite(most) else 0.0
