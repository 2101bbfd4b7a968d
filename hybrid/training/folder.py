"""Writes the record at a run's begin and after an error, and removes what an earlier run left.

The record there says `running`, then `ok`, `failed` or `not_possible` with the reason, so that a
reader never takes the record or the weights of the run before for this run's. No torch."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import records
from ..checkpoint.names import CHECKPOINTS
from ..job.errors import NoRoom, RunFailed, first_line, kind_of, needs_room
from ..job.file import to_dict
from ..job.schema import Job
from ..job.traces import users_line
from ..job.variants import Choice
from ..launch.failures import lack_of_memory
from ..records import Record, Status
from ..records.whole import remove_parts, whole_file
from .branches import BRANCHES
from .leftovers import FILES, FINAL, STEPS, check_run, list_saved, remove


def begin_run(
    out: Path,
    job: Job,
    choice: Choice,
    goes_on: Path | None = None,
    comparison: str | None = None,
) -> Path:
    """Remove what an earlier run left in `out`, and return the path of the new `job.json` there.
    The new `record.json` says `running`. job: the one that `choice` was resolved in. goes_on: the
    checkpoint from which the run goes on. If it is in `out`, other checkpoints and steps stay.
    comparison: the `id` of that of which the run is one. Raises NoRoom, and JobError where what is
    not a run's would be lost."""
    stays = goes_on is not None and belongs_to(goes_on, out)
    check_run(out, stays)
    with needs_room(out):
        out.mkdir(parents=True, exist_ok=True)
        saved = list_saved(out / CHECKPOINTS)
        remove(path for path in saved if not stays or path.name == FINAL)
        if not stays:
            (out / STEPS).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there is none, or files of others in it
                (out / CHECKPOINTS).rmdir()
        # What a killed run may have left.
        remove_parts(*(out / name for name in FILES))
        shutil.rmtree(out / BRANCHES, ignore_errors=True)
        record = Record(choice.name, "running", variant_of=choice.variant_of, comparison=comparison)
        records.write(record, out / "record.json")
        records.write(to_dict(job), out / "job.json")
    return out / "job.json"


def comparison_of(out: Path) -> str | None:
    """Return the `id` of the comparison of which the run in `out` is one, as it began."""
    found = records.load_object(out / "record.json").get("comparison")
    return found if isinstance(found, str) else None


def belongs_to(checkpoint: Path, out: Path) -> bool:
    """Tell whether a step's folder is one of the run in `out`."""
    return checkpoint.resolve().parent == (out / CHECKPOINTS).resolve()


def keep_steps(out: Path, checkpoint: Path, step: int) -> list[str]:
    """Leave in `out/steps.jsonl` the lines of the first `step` steps alone; warn of missing ones.

    They are taken from the run of the checkpoint if that is another one. A killed run has written
    lines of later steps, and perhaps half a line."""
    run = out if belongs_to(checkpoint, out) else checkpoint.resolve().parent.parent
    kept = 0
    with needs_room(out), whole_file(out / STEPS) as file:
        for line in _lines_of(run / STEPS, step):
            file.write(line)
            kept += 1
    if kept == step:
        return []
    missing = f"{step - kept} of the {step} steps before are not in the record"
    return [f"{missing}: {run / STEPS} has no lines of them"]


def _lines_of(file: Path, step: int) -> Iterator[bytes]:
    """Yield the whole lines of steps before `step`, as far as they can be read."""
    if not file.is_file():
        return
    with open(file, "rb") as lines:
        for line in lines:
            try:
                number = int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                return
            if number >= step or not line.endswith(b"\n"):
                return
            yield line


def end_run(
    out: Path,
    choice: Choice,
    world_size: int,
    error: BaseException,
    warnings: Sequence[str] = (),
) -> Record:
    """Write and return the record of a run that ended with this error.

    Where the error says that there is no room for anything, there may be none for the record."""
    kind = error.failure.kind if isinstance(error, RunFailed) else kind_of(error)
    status: Status = "not_possible" if kind == "unsupported" else "failed"
    if isinstance(error, RunFailed):
        reason = str(error) if kind == "error" else error.failure.message
    elif isinstance(error, (KeyboardInterrupt, SystemExit)) and kind != "stopped":
        reason = records.INTERRUPTED
    elif lack := lack_of_memory(error):
        reason = f"rank 0: {lack}"  # the rank that writes records
    else:
        reason = first_line(error)
        log = out / "logs" / "rank0.log"
        if users_line(error) and log.exists():
            reason += f" (log: {log})"
    record = Record(
        choice.name,
        status,
        reason,
        world_size=world_size,
        variant_of=choice.variant_of,
        comparison=comparison_of(out),
    )
    try:
        with needs_room(out):
            records.write(record, out / "record.json")
        return add_warnings(out, record, warnings)
    except (NoRoom, OSError):
        if kind != "room":
            raise
    return record


def add_warnings(out: Path, record: Record, warnings: Sequence[str]) -> Record:
    """Write what the try-out found into the record of a run in `out`, and return that."""
    if warnings:
        record = dataclasses.replace(record, warnings=[*record.warnings, *warnings])
        records.write(record, out / "record.json")
    return record
