"""This module keeps the records of a run's steps, on rank 0 alone.

With a folder they are lines of `steps.jsonl` there, written a few times a second, and memory does
not grow with the steps."""

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engines.protocol import StepResult
from ..launch.exchange import gather_objects
from ..launch.serialization import sendable
from ..records import StepRecord
from ..records.steps import bound, make_step
from ..records.whole import naming, no_links

sendable(StepRecord)
WRITE_EVERY_S = 0.25  # as often as a terminal shows the last step


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
        self._written = -math.inf  # when lines were written last

    def add(self, record: StepRecord, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Take the next step and return its line: the record, and what the step took."""
        self.count += 1
        self.samples += record.samples
        self.changed |= bool(record.lr and record.grad_norm and not record.skipped)
        self.targets += record.targets or 0
        line = {**vars(record), **figures}
        if self._file:
            finite = math.isfinite(record.loss)  # JSON has no NaN
            told = line if finite else line | {"loss": str(record.loss)}
            self._lines.append(json.dumps(told) + "\n")
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

    def write(self, now: bool = True) -> None:
        """Write the lines that have been added, all of them whole.

        now: also where the last ones were written less than `WRITE_EVERY_S` ago."""
        if self._path and self._lines and (now or self._is_due()):
            self._written = time.monotonic()
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

    def _is_due(self) -> bool:
        return time.monotonic() - self._written >= WRITE_EVERY_S

    def all(self) -> tuple[list[StepRecord], dict[str, int]]:
        """Return the records of the steps, on every rank, and `Record.left_out`; collective.

        Of many steps in a file they are the first and the last ones."""
        self.write()
        count = 0
        if self._file:
            self._file.seek(0)
            with io.BufferedReader(self._file) as file:
                lines, count = bound(file)
            self._kept = [make_step(line) for line in lines]
        steps, count = gather_objects((self._kept, count) if self._here else None)[0]
        return steps, {"steps": count} if count else {}


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
