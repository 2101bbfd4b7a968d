"""Makes the runs of a comparison, each in its folder, or keeps those that are there. No torch here.

A run that was stopped in the middle goes on from its newest checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.names import CHECKPOINTS, step_name
from ..job.errors import JobError, NoRoom, RunFailed
from ..job.schema import Job
from ..records import INTERRUPTED, Record, read
from ..records.steps import with_all_steps
from ..training.check import CheckedJob
from ..training.progress import Watcher
from ..training.resume import Chosen
from ..training.run import Starter, launch
from .resume import drop_results, find_checkpoint, find_run


@dataclasses.dataclass(frozen=True)
class Runs:
    """Makes the runs of one comparison.

    resume: what ended well is kept, and what was stopped goes on. title: what stands before the
    runs' names where they are shown. session: what `describe_session` says of the comparison."""

    checked: CheckedJob
    out: Path
    watcher: Watcher
    program: Starter | None
    resume: bool
    title: str
    session: Mapping[str, Any]

    def make(
        self, label: str, job: Job, name: str, nproc: int, cores_for: int | None = None
    ) -> Record:
        """Launch one run in `out/label`, unless it is there and may be kept.

        Raises JobError where the job is wrong, and NoRoom."""
        start = None
        if self.resume:
            asked = self.out / label, job, name, nproc, self.session
            if kept := find_run(*asked):
                self.watcher.kept(self.title + label, kept)
                return kept
            start = find_checkpoint(*asked, self.title + label)
        return self._launch(label, job, name, nproc, cores_for, resume=start)

    def make_interrupted(
        self, label: str, job: Job, first: tuple[str, int], second: tuple[str, int], step: int
    ) -> Record:
        """Launch a run that stops after `step` steps, and one that goes on from there.

        first, second: a name and a number of processes. Where one of the two fails, its record is
        returned. Whatever the first part left before is begun anew."""
        folder = self.out / label
        if self.resume and (kept := find_run(folder, job, *second, self.session, step)):
            self.watcher.kept(self.title + label, kept)
            return kept
        record = self._launch(label, job, *first, None, until=step)
        if record.reason != INTERRUPTED or record.checkpoint is None:
            return record
        saved = folder / CHECKPOINTS / step_name(step)
        return self._launch(label, job, *second, None, resume=saved)

    def _launch(
        self,
        label: str,
        job: Job,
        name: str,
        nproc: int,
        cores_for: int | None,
        resume: Chosen | Path | None = None,
        until: int | None = None,
    ) -> Record:
        drop_results(self.out)
        folder, found = self.out / label, self.checked.warnings(name)
        shown = self.title + label
        rest = self.watcher, shown, self.program, found, cores_for
        try:
            how: Any = {"resume": resume, "until": until, "comparison": self.session["id"]}
            return with_all_steps(launch(job, name, nproc, folder, *rest, **how), folder)
        except RunFailed as error:
            # A checkpoint that a run cannot take over is this run's failure: the job is right.
            if error.failure.kind == "job" and resume is None:
                raise JobError(error.failure.message) from None
            if error.failure.kind == "room":  # no other run would find any
                raise NoRoom(error.failure.message) from None
            return read(Record, folder / "record.json")
