"""Writes the record at a run's begin and after an error, and removes what an earlier run left.

The record there says `running`, then `ok`, `failed` or `not_possible` with the reason, so that a
reader never takes the record or the weights of the run before for this run's. No torch."""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .. import records
from ..checkpoint.names import CHECKPOINTS
from ..job.errors import RunFailed, first_line, kind_of, needs_room
from ..job.file import to_dict
from ..job.schema import Job
from ..job.traces import users_line
from ..job.variants import Choice
from ..records import Record, Status

STEPS = "steps.jsonl"


def begin_run(out: Path, job: Job, choice: Choice, goes_on: Path | None = None) -> Path:
    """Remove what an earlier run left in `out`, and return the path of the new `job.json` there.
    The new `record.json` says `running`. job: the one that `choice` was resolved in. goes_on: the
    checkpoint from which the run goes on. If it is in `out`, other checkpoints and steps stay.
    Raises NoRoom."""
    with needs_room(out):
        out.mkdir(parents=True, exist_ok=True)
        if goes_on and belongs_to(goes_on, out):
            shutil.rmtree(out / CHECKPOINTS / "final", ignore_errors=True)
        else:
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
            (out / STEPS).unlink(missing_ok=True)
        record = Record(choice.name, "running", variant_of=choice.variant_of)
        records.write(record, out / "record.json")
        records.write(to_dict(job), out / "job.json")
    return out / "job.json"


def belongs_to(checkpoint: Path, out: Path) -> bool:
    """Tell whether a step's folder is one of the run in `out`."""
    return checkpoint.resolve().parent == (out / CHECKPOINTS).resolve()


def keep_steps(out: Path, checkpoint: Path, step: int) -> list[str]:
    """Leave in `out/steps.jsonl` the lines of the first `step` steps alone; warn of missing ones.

    They are taken from the run of the checkpoint if that is another one. A killed run has written
    lines of later steps, and perhaps half a line."""
    run = out if belongs_to(checkpoint, out) else checkpoint.resolve().parent.parent
    kept, text = list[str](), ""
    if (run / STEPS).is_file():
        text = (run / STEPS).read_text(errors="replace")
    for line in text.splitlines(keepends=True):
        try:
            number = int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            break
        if number >= step or not line.endswith("\n"):
            break
        kept.append(line)
    with needs_room(out):
        part = out / f"{STEPS}.part"
        part.write_text("".join(kept))
        os.replace(part, out / STEPS)
    if len(kept) == step:
        return []
    missing = f"{step - len(kept)} of the {step} steps before are not in the record"
    return [f"{missing}: {run / STEPS} has no lines of them"]


def end_run(out: Path, choice: Choice, world_size: int, error: BaseException) -> Record:
    """Write and return the record of a run that ended with this error."""
    kind = error.failure.kind if isinstance(error, RunFailed) else kind_of(error)
    status: Status = "not_possible" if kind == "unsupported" else "failed"
    if isinstance(error, RunFailed):
        reason = str(error) if kind == "error" else error.failure.message
    elif isinstance(error, (KeyboardInterrupt, SystemExit)) and kind != "stopped":
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
