"""Stands for the launch of runs, so that tests of a comparison's order start no process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

import hybrid
from hybrid import records
from hybrid.comparison import runs
from hybrid.job.schema import Job
from hybrid.job.variants import resolve
from hybrid.measure.machine import describe_machine
from hybrid.records import (
    INTERRUPTED,
    Comparison,
    Receipt,
    Record,
    ResumedFrom,
    SavedState,
    StepRecord,
    Weights,
)
from hybrid.strategies import registry
from hybrid.training.folder import begin_run, end_run
from tests.conftest import small_job

NAMES = ["ddp", "fsdp", "zero1"]
PROXY = {"train.steps": 2}


class Launches:
    """Stands for `launch`: notes the folder of each run, and ends it at once as it is told."""

    def __init__(self, out: Path) -> None:
        self.out, self.made = out, list[str]()
        self.ends: dict[str, BaseException] = {}  # by the folder of the run
        self.only_resumed = False  # the ends are those of resumed runs alone
        self.losses: dict[str, float] = {}
        self.late: dict[str, float] = {}  # the loss from step 25 on

    def __call__(
        self, job: Job, name: str, nproc: int, out: Path, watcher: Any, *more: Any, **how: Any
    ) -> Record:
        folder = str(out.relative_to(self.out))
        self.made.append(folder)
        choice = resolve(job, name)
        until, resume = how.get("until"), how.get("resume")
        mark = how["comparison"]
        begin_run(out, job, choice, getattr(resume, "folder", resume), mark)
        if (error := self.ends.get(folder)) and (resume or not self.only_resumed):
            end_run(out, choice, nproc, error)
            raise error
        if until:
            saved = SavedState(until, "5" * 64)
            return Record(name, "failed", INTERRUPTED, checkpoint=saved, comparison=mark)
        loss = self.losses.get(folder, 2.0)
        losses = [loss] * 25 + [self.late.get(folder, loss)] * 25
        steps = [StepRecord(n, losses[n], 1.0, 0.1, 24, "0a") for n in range(job.train.steps or 0)]
        file = out / "checkpoints" / "final" / "model.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": numpy.ones(3, dtype="float32")}, file)
        record = Record(
            name,
            "ok",
            world_size=nproc,
            layout=registry.get(choice.strategy).layout(choice.job, nproc).to_dict(),
            receipt=Receipt(True, {}),
            steps=steps,
            weights=Weights({}, {}, str(file.relative_to(out))),
            environment=describe_machine(),
            variant_of=choice.variant_of,
            comparison=mark,
            resumed_from=resume and ResumedFrom(str(resume), int(resume.name[5:]), "5" * 64),
        )
        records.write(record, out / "record.json")
        return record


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """No process starts while a test has this."""
    stand_in = Launches(tmp_path)
    monkeypatch.setattr(runs, "launch", stand_in)
    return stand_in


def compare(
    launches: Launches, strategies: list[str] | None = NAMES, job: Any = None, **more: Any
) -> Comparison:
    out = launches.out
    return hybrid.compare(job or small_job(), strategies, nproc=2, out=out, **more)


def states(result: Comparison) -> dict[str, str]:
    return {name: parity.state for name, parity in result.parity.items()}


def written(launches: Launches) -> Comparison:
    result = records.read(Comparison, launches.out / "compare.json")
    assert (launches.out / "report.html").exists() and (launches.out / "compare.md").exists()
    return result
