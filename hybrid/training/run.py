"""Runs a job with the same checks, warnings and files, whichever launcher starts the processes.

`hybrid train` calls `run_job`, in the process that a person starts and in every rank. `launch`
starts the ranks where no other launcher has; comparisons call it too. `hybrid.records` describes
what a run leaves in its folder. No torch until a job is checked."""

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import records
from ..job.errors import JobError, RunFailed, Stopped, needs_room
from ..job.schema import Job
from ..job.variants import Choice, resolve, warnings_of
from ..launch.accelerate_env import check_started
from ..launch.local import PROGRAM, Program, run_ranks
from ..launch.logs import redirect_output
from ..launch.ops_cache import remove_stale_locks
from ..launch.orphans import end_with_launcher
from ..launch.placement import OWN, export_rank_variables, find_placement
from ..launch.stopping import end_now, requeue
from ..launch.threads import set_num_threads
from ..launch.warm import warm_ranks
from ..records import Record, StepRecord
from ..strategies import registry
from .apart import check_apart
from .branches import explain
from .check import print_warnings
from .folder import add_warnings, begin_run, end_run, keep_steps
from .progress import Progress, Watcher
from .resume import Chosen, decide, read_chosen, refuse_restart, tell_start


def run_job(
    job: Job,
    strategy: str,
    out: Path,
    nproc: int | None = None,
    parent: int | None = None,
    fresh_ranks: bool = False,
    resume: str | None = None,
    until: int | None = None,
) -> Record | None:
    """Run a job once, on the ranks of a launcher or on `nproc` processes that this one starts.

    strategy: its name, or that of a variant in the job. parent: the process id of the `hybrid` that
    started this rank. fresh_ranks: start each rank afresh; left out, all are forked from one
    process. resume, until: see `train`. Returns the record in the process that shows it, None in
    the others. Raises JobError, Unsupported, RunFailed, NoRoom or the run's error.
    """
    placement = find_placement(started_by_hybrid=parent is not None)
    if placement.rank == 0 and parent is None:
        print_warnings(warnings_of(job, [strategy]))
    registry.check_settings(job, [strategy])
    if job.checkpoint.every and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, end_now)  # until the run has steps to save
    if placement.launcher is None:
        with needs_room(out), warm_ranks(fresh_ranks):
            return _launch_checked(job, strategy, out, nproc, resume, until)
    end_with_launcher(parent)
    if nproc not in (None, placement.world_size):
        raise JobError(f"--nproc {nproc}: the launcher started {placement.world_size} processes")
    placement = registry.place(job, strategy, placement)
    export_rank_variables(placement)
    on_step = None
    if placement.launcher != OWN:
        redirect_output(out / "logs", placement)
        on_step = _follow(job, strategy, out) if placement.rank == 0 else None
    set_num_threads(placement)
    from .loop import train

    record = train(job, strategy, out, on_step, placement, resume=resume, until=until)
    return record if placement.rank == 0 and placement.launcher != OWN else None


def _follow(job: Job, strategy: str, out: Path) -> Callable[[StepRecord, int], None]:
    """Return what shows the steps of a run on the ranks of another launcher."""
    watcher = Progress(shared=True)
    watcher.started(strategy, job.train.steps or 0, out)
    return watcher.follow


def _launch_checked(
    job: Job,
    strategy: str,
    out: Path,
    nproc: int | None,
    resume: str | None,
    until: int | None,
) -> Record:
    """Check the job, then start its ranks and show their progress.

    Where the folder has the whole run that is to go on, its record is returned."""
    choice = resolve(job, strategy)
    if resume is None:
        refuse_restart(out)
    checked = check_apart(job, registry.modules(choice.strategy)).require()
    remove_stale_locks()
    layout, warnings = checked.plan(strategy, nproc or default_nproc(choice.job))
    check_started(layout.world_size)
    found = checked.warnings(strategy)
    print_warnings([*(f"{strategy}: {line}" for line in warnings), *found])
    replicas = choice.job.strategy.local_sgd.emulate_replicas
    emulating = choice.strategy == "local_sgd" and replicas
    start = decide(out, resume, resolve(checked.job, strategy))
    tell_start(start)
    if start.ended:
        return start.ended
    known = [*found, *start.notes]
    watcher, world_size = Progress(), 1 if emulating else layout.world_size
    rest, chosen = (checked.job, strategy, world_size, out, watcher), start.chosen
    try:
        record = launch(*rest, warnings=known, resume=chosen, until=until)
        told = (line for line in record.warnings if line not in known)  # by the engine itself
        print_warnings(f"{strategy}: {line}" for line in told)
        return record
    except Stopped as stopped:
        stopped.tell(requeue(stopped))
        raise
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
    warnings: Sequence[str] = (),
    cores_for: int | None = None,
    resume: Chosen | Path | None = None,
    until: int | None = None,
) -> Record:
    """Start `nproc` ranks of a checked job, wait for them and return the record.

    label: the run's name for the watcher, if it is not the strategy's. program: what starts a rank,
    else `PROGRAM`. warnings: of the try-out, for the record. cores_for: see `run_ranks`. resume:
    the checkpoint from which the run goes on, or its folder. until: see `train`; the record says
    `interrupted`, though all went well. Raises RunFailed with the first cause, and Stopped where a
    signal stopped the run; the record then says `failed` or `not_possible`."""
    label, choice = label or strategy, resolve(job, strategy)
    chosen = read_chosen(resume, choice) if isinstance(resume, Path) else resume
    file, missing = _begin(out, job, choice, chosen, label)
    warnings = [*warnings, *missing]
    watcher.started(label, job.train.steps or 0, out)
    options = {"--strategy": strategy, "--out": out, "--parent": os.getpid(), "--until": until}
    options["--resume"] = chosen.folder if chosen else None
    arguments = ["train", str(file), *_given(options)]
    try:
        rest = program or PROGRAM, registry.modules(choice.strategy), _cores_for(choice, cores_for)
        run_ranks(nproc, arguments, out, watcher.poll, *rest, bool(job.checkpoint.every), True)
        record = add_warnings(out, records.read(Record, out / "record.json"), warnings)
    except BaseException as raised:
        error = _explained(raised, job, strategy, nproc)
        record = add_warnings(out, end_run(out, choice, nproc, error), warnings)
        if isinstance(error, RunFailed):
            watcher.finished(label, record)
        raise error from None
    watcher.finished(label, record)
    return record


def _begin(
    out: Path, job: Job, choice: Choice, chosen: Chosen | None, label: str
) -> tuple[Path, list[str]]:
    """Begin a run's record and its steps; return its job's file, and a warning of lost steps."""
    file = begin_run(out, job, choice, chosen.folder if chosen else None)
    missing = keep_steps(out, chosen.folder, chosen.manifest.step) if chosen else []
    print_warnings(f"{label}: {line}" for line in missing)
    return file, missing


def _explained(error: BaseException, job: Job, strategy: str, nproc: int) -> BaseException:
    if isinstance(error, RunFailed):
        return RunFailed(explain(error.failure, job, strategy, nproc))
    return error


def _given(options: Mapping[str, Any]) -> list[str]:
    """Return the words of the options that have a value."""
    return [word for key, v in options.items() if v is not None for word in (key, str(v))]


def _cores_for(choice: Choice, given: int | None) -> int | None:
    """Return of how many ranks a process has the threads; None: of those that run.

    An emulation computes with the threads of a rank that it plays: more of them sum up in another
    order, and round otherwise."""
    if choice.strategy != "local_sgd":
        return given
    return choice.job.strategy.local_sgd.emulate_replicas or given


def default_nproc(job: Job) -> int:
    """Return the number of processes that `[parallel]` asks for; 2 where it names no degree."""
    p = job.parallel
    return (p.pp or 1) * (p.dp or 1) if p.pp or p.dp else (p.replicate or 1) * (p.shard or 2)
