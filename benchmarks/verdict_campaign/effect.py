"""Measures how far a fault moved a run, and how far rounding moves a right run there.

The faulty run is held against a right run of the same strategy, which would have the same bits
without the fault. The right run's own distance from its reference shows what rounding does there.
This knows nothing of the rule that judges runs, nor of its tolerances."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid import records
from hybrid.records import Record

# Relative differences of a norm or an update that rounding makes with no help: 16 times fp32's unit
# roundoff, since a sum has many terms, and once that of bf16 (2**-8). A loss is summed in fp32, and
# is the mean of so many outputs that the rounding of bf16's evens out in part.
ROUNDING = {"fp32": 1e-6, "bf16": 4e-3}
ROUNDING_OF_LOSS = {"fp32": 1e-6, "bf16": 1e-3}
# An effect counts as visible from this many times what rounding was seen to do there. A single
# right run shows rounding at one draw, and another draw may be some times as large.
MARGIN = 4.0
START = 1e-8  # initial weights are not rounded at all; their float64 projections are
Place = tuple[str, Any]  # a quantity, with its step or tensor


@dataclasses.dataclass(frozen=True)
class Effect:
    """Says where a fault shows most.

    size: the relative difference that it made there. rounding: what rounding may make there.
    visible: the size over that; at 1 or less the fault changed nothing that could be measured."""

    place: str
    size: float
    rounding: float
    visible: float


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """Holds a run's record and its final weights, as numpy arrays by name."""

    record: Record
    weights: Mapping[str, Any]


def load_run(folder: Path) -> FinishedRun:
    """Read a run back from its folder; raises ValueError if its record names no weights."""
    from safetensors.numpy import load_file

    record = records.read(Record, folder / "record.json")
    if record.weights is None or record.weights.file is None:
        raise ValueError(f"{folder}: the record names no weights")
    return FinishedRun(record, load_file(folder / record.weights.file))


def measure_effect(
    faulty: FinishedRun,
    right: FinishedRun,
    references: Sequence[FinishedRun],
    start: Mapping[str, Any],
    precision: str,
) -> Effect:
    """Return where the fault shows most against rounding; start: the weights before training.

    Rounding is how far the right run is from its references, at most."""
    sizes, noise = _distances(faulty, right), dict[Place, float]()
    for reference in references:
        for place, size in _so_far(_distances(right, reference)).items():
            noise[place] = max(size, noise.get(place, 0.0))
    least = _least(right, start, precision)
    found = []
    for place, size in sizes.items():
        rounding = max(MARGIN * noise.get(place, 0.0), least[place[0], _tensor(place)])
        found.append((size / rounding, size, rounding, f"{place[0]} of {place[1]}"))
    visible, size, rounding, name = max(found)
    return Effect(name, size, rounding, visible)


def _tensor(place: Place) -> str | None:
    return place[1] if place[0] == "weights" else None


def _least(
    right: FinishedRun, start: Mapping[str, Any], precision: str
) -> dict[tuple[str, str | None], float]:
    """Return the least rounding by quantity, and for weights by tensor: that of its update."""
    rounding, of_loss = ROUNDING[precision], ROUNDING_OF_LOSS[precision]
    least: dict[tuple[str, str | None], float] = {
        ("loss", None): of_loss,
        ("grad_norm", None): rounding,
        ("eval loss", None): of_loss,
        ("initial weights", None): START,
    }
    for name, value in right.weights.items():
        least["weights", name] = max(1e-6, rounding * _array_distance(start[name], value))
    return least


def _distances(got: FinishedRun, expected: FinishedRun) -> dict[Place, float]:
    """Return the relative differences of two runs of the same number of steps, by place."""
    found: dict[Place, float] = {}
    mine, theirs = got.record, expected.record
    if mine.weights and theirs.weights:
        for name, value in theirs.weights.initial.items():
            found["initial weights", name] = _distance(mine.weights.initial[name], value)
    for a, b in zip(mine.steps, theirs.steps, strict=True):
        found["loss", b.step] = _distance(a.loss, b.loss)
        if a.grad_norm is not None and b.grad_norm is not None:
            found["grad_norm", b.step] = _distance(a.grad_norm, b.grad_norm)
    for name, value in expected.weights.items():
        found["weights", name] = _array_distance(got.weights[name], value)
    if mine.eval and theirs.eval:
        found["eval loss", "the end"] = _distance(mine.eval.loss, theirs.eval.loss)
    return found


def _distance(got: float, expected: float) -> float:
    return abs(got - expected) / max(abs(expected), 1e-30)


def _array_distance(got: Any, expected: Any) -> float:
    away = float(abs(got.astype("float64") - expected.astype("float64")).max(initial=0.0))
    return away / max(float(abs(expected).max(initial=0.0)), 1e-30)


def _so_far(noise: Mapping[Place, float]) -> dict[Place, float]:
    """Give each step the greatest noise up to it, since one step's can be small by chance."""
    found = dict(noise)
    for quantity in ("loss", "grad_norm"):
        steps = [place for place in noise if place[0] == quantity]
        highest = itertools.accumulate((noise[place] for place in steps), max)
        found |= dict(zip(steps, highest, strict=True))
    return found
