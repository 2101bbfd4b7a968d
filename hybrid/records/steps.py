"""This module keeps the record of a long run small: its steps stand in `steps.jsonl`.

A list of a record holds `MOST` entries at most: of a longer one the first and the last ones, and
`left_out` says how many are missing between them. Steps that were left out are read back from
`steps.jsonl`, as a comparison does; no torch here."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from . import Comparison, Record, StepRecord, read, read_line

MOST = 1000  # entries of a list in a record: about 300 kB of steps
STEPS = "steps.jsonl"
T = TypeVar("T")


def bound(entries: Iterable[T]) -> tuple[list[T], int]:
    """Return the entries, or the first and the last ones; and how many are left out of them."""
    left = iter(entries)
    first = list(itertools.islice(left, MOST // 2))
    last, count = deque[T](maxlen=MOST // 2), 0
    for entry in left:
        last.append(entry)
        count += 1
    return [*first, *last], count - len(last)


def shorten(record: Record) -> Record:
    """Return the record with lists of `MOST` entries at most, as it is written."""
    changed: dict[str, Any] = {}
    left_out = dict(record.left_out)
    for name in ("steps", "evals", "drift"):
        entries = getattr(record, name) or ()
        if len(entries) > MOST:
            changed[name], count = bound(entries)
            left_out[name] = left_out.get(name, 0) + count
    if not changed:
        return record
    receipt = record.receipt
    if receipt and "drift" in changed and "drift" in receipt.evidence:
        evidence = {**receipt.evidence, "drift": changed["drift"]}
        changed["receipt"] = dataclasses.replace(receipt, evidence=evidence)
    return dataclasses.replace(record, **changed, left_out=left_out)


def shorten_all(comparison: Comparison) -> Comparison:
    """Return the comparison with short records, as it is written."""
    runs = {name: shorten(record) for name, record in comparison.strategies.items()}
    controls = {name: shorten(record) for name, record in comparison.controls.items()}
    return dataclasses.replace(comparison, strategies=runs, controls=controls)


def read_steps(file: Path) -> Iterator[StepRecord]:
    """Yield the steps of a run, one by one, from its `steps.jsonl`; raises ValueError or OSError.

    A line also has what the step took (docs/reading-a-comparison.md), which is left out here."""
    with open(file, "rb") as lines:
        for line in lines:
            yield make_step(line)


def make_step(line: bytes) -> StepRecord:
    """Return the record of a step that a line of `steps.jsonl` has; raises ValueError."""
    found, names = read_line(line), StepRecord.__dataclass_fields__
    return StepRecord(**{name: found[name] for name in names if name in found})


def read_run(out: Path) -> Record:
    """Return the record of the run in a folder with all of its steps; ValueError, OSError."""
    return with_all_steps(read(Record, out / "record.json"), out)


def with_all_steps(record: Record, out: Path) -> Record:
    """Return the record of the run in a folder with the steps that were left out; see above."""
    left_out = dict(record.left_out)
    missing = left_out.pop("steps", 0)
    if not missing:
        return record
    steps, wanted = list(read_steps(out / STEPS)), len(record.steps) + missing
    if len(steps) != wanted:
        raise ValueError(f"{out / STEPS}: has {len(steps)} of the {wanted} steps of the record")
    return dataclasses.replace(record, steps=steps, left_out=left_out)
