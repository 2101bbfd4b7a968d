"""Writes the record at a run's begin and after an error, and removes what an earlier run left.

The record there says `running`, then `ok`, `failed` or `not_possible` with the reason, so that a
reader never takes the record or the weights of the run before for this run's. No torch."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from .. import records
from ..job.errors import RunFailed, first_line, kind_of, needs_room
from ..job.file import to_dict
from ..job.schema import Job
from ..job.traces import users_line
from ..job.variants import Choice
from ..records import Record, Status

CHECKPOINTS = "checkpoints"


def begin_run(out: Path, job: Job, choice: Choice, resumes: bool = False) -> Path:
    """Remove what an earlier run left in `out`, and return the path of the new `job.json` there.
    The new `record.json` says `running`. job: the one that `choice` was resolved in. resumes: the
    run goes on from where it was, so its checkpoints and steps stay. Raises NoRoom."""
    with needs_room(out):
        out.mkdir(parents=True, exist_ok=True)
        if not resumes:
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
            (out / "steps.jsonl").unlink(missing_ok=True)
        record = Record(choice.name, "running", variant_of=choice.variant_of)
        records.write(record, out / "record.json")
        records.write(to_dict(job), out / "job.json")
    return out / "job.json"


def end_run(out: Path, choice: Choice, world_size: int, error: BaseException) -> Record:
    """Write and return the record of a run that ended with this error."""
    kind = error.failure.kind if isinstance(error, RunFailed) else kind_of(error)
    status: Status = "not_possible" if kind == "unsupported" else "failed"
    if isinstance(error, RunFailed):
        reason = str(error) if kind == "error" else error.failure.message
    elif isinstance(error, (KeyboardInterrupt, SystemExit)):
        reason = records.INTERRUPTED
    else:
        reason = first_line(error)
        log = out / "logs" / "rank0.log"
        if users_line(error) and log.exists():
            reason += f" (log: {log})"
    variant_of = choice.variant_of
    record = Record(choice.name, status, reason, world_size=world_size, variant_of=variant_of)
    with needs_room(out):
        records.write(record, out / "record.json")
    return record


def add_warnings(out: Path, record: Record, warnings: Sequence[str]) -> Record:
    """Write what the try-out found into the record of a run in `out`, and return that."""
    if warnings:
        record = dataclasses.replace(record, warnings=[*record.warnings, *warnings])
        records.write(record, out / "record.json")
    return record
