"""This module keeps the records of a run's steps, on rank 0 alone.

With a folder they are lines of `steps.jsonl` there, and memory does not grow with the steps."""

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engines.protocol import StepResult
from ..launch.exchange import gather_objects
from ..launch.serialization import sendable
from ..records import StepRecord, read_line
from ..records.whole import naming, no_links

sendable(StepRecord)


class StepLog:
    """Holds the records of the steps so far.

    here: this process keeps them. out: the run's folder, None: they stay in memory. start, samples:
    the steps that a run had made before it goes on here, whose lines the file has."""

    def __init__(self, here: bool, out: Path | None, start: int = 0, samples: int = 0) -> None:
        self.count = start
        self.samples = samples  # of all steps
        self._before = samples
        self.changed = False  # a step since the last checkpoint must have changed the state
        self.targets: int | float = 0  # of the steps that are made here
        self._here, self._kept = here, list[StepRecord]()
        self._path = out / "steps.jsonl" if out else None
        self._file: Any = None
        if self._path:
            self._file = open(self._path, "a+b", 0, opener=no_links)  # noqa: SIM115 - until `all`
        self._lines = list[str]()  # not written yet

    def add(self, record: StepRecord, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Take the next step and return its line: the record, and what the step took."""
        self.count += 1
        self.samples += record.samples
        self.changed |= bool(record.lr and record.grad_norm and not record.skipped)
        self.targets += record.targets or 0
        line = vars(record) | dict(figures)
        if self._file:
            # JSON has no NaN.
            loss = record.loss if math.isfinite(record.loss) else str(record.loss)
            self._lines.append(json.dumps(line | {"loss": loss}) + "\n")
        elif self._here:
            self._kept.append(record)
        return line

    def tokens(self, batch: int) -> float | None:
        """Return the tokens in a batch of so many samples, on average; None: samples have none.

        Of weighted targets the count is no number of tokens."""
        if isinstance(self.targets, float):
            return None
        tokens = self.targets / max(1, self.samples - self._before)
        return tokens * batch if tokens > 1 else None

    def write(self) -> None:
        """Write the lines that have been added, all of them whole."""
        if self._path and self._lines:
            text, self._lines = "".join(self._lines).encode(), []
            end = self._file.seek(0, os.SEEK_END)
            try:
                with naming(self._path):
                    while text:
                        text = text[self._file.write(text) :]
            except BaseException:  # such as a full disk: no half line stays
                with contextlib.suppress(OSError):
                    self._file.truncate(end)
                raise

    def all(self) -> list[StepRecord]:
        """Return the records of all steps, on every rank; collective."""
        self.write()
        if self._file:
            self._file.seek(0)
            names = StepRecord.__dataclass_fields__
            with io.BufferedReader(self._file) as file:
                lines = [read_line(line) for line in file]
            self._kept = [StepRecord(**{n: line[n] for n in names if n in line}) for line in lines]
        return gather_objects(self._kept if self._here else None)[0]


def make_record(step: int, result: StepResult, back: int | None = None) -> StepRecord:
    """Make the record of a step from what the engine says of it; back: see `rolled_back_to`."""
    return StepRecord(
        step=step,
        loss=result.loss,
        grad_norm=None if result.skipped else result.grad_norm,
        lr=result.lr,
        samples=result.samples,
        sample_digest=result.sample_digest,
        targets=result.targets,
        loss_scale=result.loss_scale,
        skipped=result.skipped,
        rolled_back_to=back,
    )
