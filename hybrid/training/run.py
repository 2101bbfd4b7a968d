"""The one door into a run: whoever starts it, the same checks, the same warnings, the same files.

`run_job` is what `hybrid train` calls, in the process that a person starts and in every rank.
`launch` starts the ranks of a run that nothing else has started; comparisons call it too. What a
run leaves in its folder is described in `hybrid.records`. No torch until a job is checked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .. import records
from ..job.errors import JobError, RunFailed
from ..job.schema import Job
from ..launch.accelerate_env import check_started
from ..launch.local import run_ranks
from ..launch.logs import redirect_output
from ..launch.ops_cache import remove_stale_locks
from ..launch.orphans import end_with_launcher
from ..launch.placement import OWN, export_rank_variables, find_placement
from ..launch.threads import set_num_threads
from ..records import Record
from ..strategies import registry
from .check import check_job, print_warnings
from .folder import begin_run, end_run
from .progress import Progress

Program = Sequence[str]
PROGRAM: Program = (sys.executable, "-m", "hybrid")


class Watcher(Protocol):
    """Is told what runs do, to show it."""

    def started(self, name: str, steps: int, out: Path) -> None:
        """A run begins; its `steps.jsonl` grows in `out`."""
        ...

    def poll(self) -> None:
        """Called often while a run lasts."""
        ...

    def finished(self, name: str, record: Record) -> None:
        """A run has ended."""
        ...


class Silent:
    """A watcher that shows nothing."""

    def started(self, name: str, steps: int, out: Path) -> None:
        """Shows nothing."""

    def poll(self) -> None:
        """Shows nothing."""

    def finished(self, name: str, record: Record) -> None:
        """Shows nothing."""


def run_job(
    job: Job, strategy: str, out: Path, nproc: int | None = None, parent: int | None = None
) -> Record | None:
    """Run a job once, on the ranks of a launcher or on `nproc` processes of its own.

    parent: the process id of the `hybrid` that started this rank. Returns the record in the process
    that shows it, None in the others. Raises JobError, Unsupported, RunFailed or the run's error.
    """
    placement = find_placement(started_by_hybrid=parent is not None)
    if placement.rank == 0 and parent is None:
        print_warnings(job.warnings())
    registry.check_settings(job, [strategy])
    if placement.launcher is None:
        return _launch_checked(job, strategy, out, nproc)
    end_with_launcher(parent)
    if nproc not in (None, placement.world_size):
        raise JobError(f"--nproc {nproc}: the launcher started {placement.world_size} processes")
    placement = registry.place(job, strategy, placement)
    export_rank_variables(placement)
    on_step = None
    if placement.launcher != OWN:
        redirect_output(out / "logs", placement)
        if placement.rank == 0:
            watcher = Progress(shared=True)
            watcher.started(strategy, job.train.steps or 0, out)
            on_step = watcher.follow
    set_num_threads(placement)
    from .loop import train

    record = train(job, strategy, out, on_step, placement)
    return record if placement.rank == 0 and placement.launcher != OWN else None


def _launch_checked(job: Job, strategy: str, out: Path, nproc: int | None) -> Record:
    """Check the job, then run it on processes of its own."""
    checked = check_job(job)
    remove_stale_locks()
    layout, warnings = registry.plan(
        checked.job, strategy, nproc or default_nproc(job), checked.summary
    )
    check_started(layout.world_size)
    print_warnings(f"{strategy}: {line}" for line in warnings)
    emulating = strategy == "local_sgd" and job.strategy.local_sgd.emulate_replicas
    watcher = Progress()
    try:
        return launch(checked.job, strategy, 1 if emulating else layout.world_size, out, watcher)
    finally:
        watcher.close()


def launch(
    job: Job,
    strategy: str,
    nproc: int,
    out: Path,
    watcher: Watcher,
    label: str | None = None,
    program: Program | None = None,
) -> Record:
    """Start `nproc` ranks of a checked job and wait for them; returns the record.

    label: the run's name for the watcher, if it is not the strategy's. `program` starts a rank;
    left out, `PROGRAM` does.
    Raises RunFailed, with the first cause; the record then says `failed` or `not_possible`.
    """
    watcher.started(label or strategy, job.train.steps or 0, out)
    file = begin_run(out, job, strategy)
    arguments = ["train", str(file), "--strategy", strategy, "--out", str(out)]
    arguments += ["--parent", str(os.getpid())]
    try:
        run_ranks(nproc, arguments, out, watcher.poll, program or PROGRAM)
        record = records.read(Record, out / "record.json")
    except BaseException as error:
        record = end_run(out, strategy, nproc, error)
        if isinstance(error, RunFailed):
            watcher.finished(label or strategy, record)
        raise
    watcher.finished(label or strategy, record)
    return record


def default_nproc(job: Job) -> int:
    """Processes that the job's own degrees ask for; 2 where it names none."""
    p = job.parallel
    return (p.pp or 1) * (p.dp or 1) if p.pp or p.dp else (p.replicate or 1) * (p.shard or 2)
