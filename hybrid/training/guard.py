"""This module takes a run back to its newest checkpoint, where its guard finds a step bad.

The steps since then, the bad one included, count as skipped: the run goes on with the step after
it. To take them again would meet the same fault again, since samples follow from the step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.folders import folder_of
from ..checkpoint.manifest import read_manifest
from ..checkpoint.names import CHECKPOINTS
from ..job.errors import RunError
from ..records import StepRecord
from .check import print_warnings
from .checkpointing import Checkpoints
from .in_progress import RunInProgress
from .resume import Chosen


def rolls_back(run: RunInProgress, step: int) -> bool:
    """Tell whether the run must go back after a step, and note to where.

    Raises RunError where it has no checkpoint yet."""
    guard = run.engine.guard
    if guard is None or not guard.rolls_back:
        return False
    run.checkpoints.wait()  # for one that is being saved
    newest = run.checkpoints.newest
    if newest is None:
        raise RunError(
            f"step {step}: {guard.fault}; guard: there is no checkpoint yet to go back to"
        )
    run.back[step] = newest.step
    return True


def go_back(run: RunInProgress, step: int) -> None:
    """Load the newest checkpoint, and go on with the step after `step`; collective."""
    guard = run.engine.guard
    assert guard is not None
    run.status.set(f"going back to the state after {run.back[step]} steps")
    with run.status.unhurried():
        values = _load_newest(run.checkpoints)
    guard.set_state(values["record"].get("guard", {}), keep_count=True)
    run.engine.skip_to(step + 1)
    run.steps.changed = False
    run.instruments.interrupt()  # it is no time of the coming step


def _load_newest(saved: Checkpoints) -> Mapping[str, Any]:
    """Load the newest checkpoint of a run, and return what its manifest says; collective.

    The run keeps what it says of the checkpoint that it began from."""
    assert saved.newest is not None
    chosen, resumed_from = saved.chosen, saved.resumed_from
    folder = folder_of((saved.out or Path()) / CHECKPOINTS, saved.newest.step)
    if chosen and saved.newest.step == saved.start:
        folder = chosen.folder  # of another run, perhaps
    saved.chosen = Chosen(folder, read_manifest(folder))
    try:
        saved.load([])
        values: Mapping[str, Any] = saved.values
    finally:
        saved.chosen, saved.resumed_from = chosen, resumed_from
    return values


def warn(run: RunInProgress, record: StepRecord, fault: str) -> None:
    """Say what went wrong in a step and what became of it, in the log and in the run's record."""
    to = record.rolled_back_to
    became = "no update was made" if to is None else f"back to the state after {to} steps"
    line = f"step {record.step}: {fault}; {became}"
    run.warnings.append(line)
    print_warnings([line] if run.placement.rank == 0 else [])
