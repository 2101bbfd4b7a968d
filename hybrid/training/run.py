"""Runs a job with the same checks, warnings and files, whichever launcher starts the processes.

`hybrid train` calls `run_job`, in the process that a person starts and in every rank. `launch`
starts the ranks where no other launcher has; comparisons call it too. `hybrid.records` describes
what a run leaves in its folder. No torch until a job is checked."""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import records
from ..job.errors import Failure, JobError, RunFailed, Stopped, needs_room
from ..job.file import to_dict
from ..job.outputs import as_word
from ..job.schema import Job
from ..job.variants import Choice, resolve, warnings_of
from ..launch.accelerate_env import check_started
from ..launch.by_launcher import (
    Launcher,
    LauncherFailed,
    choose_launcher,
    pack_job,
    require_launched,
    run_by_launcher,
)
from ..launch.devices import gpus_hidden
from ..launch.local import PROGRAM, Program, run_ranks
from ..launch.logs import redirect_output
from ..launch.ops_cache import remove_stale_locks
from ..launch.orphans import end_with_launcher
from ..launch.placement import (
    OWN,
    Placement,
    export_rank_variables,
    find_placement,
    set_apart,
)
from ..launch.stopping import end_now, requeue
from ..launch.threads import set_num_threads
from ..launch.warm import warm_ranks
from ..records import Record, StepRecord
from ..strategies import registry
from .apart import check_apart
from .branches import ends_command, explain
from .check import print_warnings
from .claiming import claim_for_run
from .early import check_early, check_run
from .folder import add_warnings, begin_run, end_run, keep_steps
from .progress import Progress, Watcher
from .resume import Chosen, check_start, decide, read_chosen, tell_start

Starter = Program | Launcher


def run_job(
    job: Job,
    strategy: str,
    out: Path,
    nproc: int | None = None,
    parent: int | None = None,
    fresh_ranks: bool = False,
    resume: str | None = None,
    until: int | None = None,
    launcher: str | None = None,
    launched: int | None = None,
) -> Record | None:
    """Run a job once, on the ranks of a launcher or on `nproc` processes that this one starts.

    parent: the process id of the `hybrid` that started this rank. fresh_ranks: none is a fork.
    strategy, resume, until: see `train`. launcher: starts the ranks in place of this process;
    launched: this is one of so many. Returns the record in the process that shows it, None in the
    others. Raises JobError, Unsupported, RunFailed, NoRoom or the run's error."""
    starter = choose_launcher(launcher, "train --launcher") if launcher is not None else None
    placement = _place(parent, nproc, starter, launched)
    if placement.rank == 0 and parent is None:
        print_warnings(warnings_of(job, [strategy]))
    registry.check_settings(job, [strategy])
    if job.checkpoint.every and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, end_now)  # until the run has steps to save
    claimed = claim_for_run(out, placement, resume is not None)
    if placement.launcher is None and not launched:
        hidden = gpus_hidden(job.launch.device)
        with claimed, needs_room(out), hidden, warm_ranks(fresh_ranks):
            return _launch_checked(job, strategy, out, nproc, resume, until, starter)
    end_with_launcher(parent)
    if nproc not in (None, placement.world_size):
        raise JobError(f"--nproc {nproc}: the launcher started {placement.world_size} processes")
    placement = registry.place(job, strategy, placement)
    export_rank_variables(placement)
    with claimed:
        return _run_rank(job, strategy, out, placement, resume, until)


def _run_rank(
    job: Job, strategy: str, out: Path, placement: Placement, resume: str | None, until: int | None
) -> Record | None:
    """Run this rank of a run, and return the record in the process that shows it."""
    if placement.launcher != OWN and not placement.launched:
        check_run(job, strategy, placement.world_size)
    on_step = None if placement.launcher == OWN else _follow(job, strategy, out, placement)
    set_num_threads(placement)
    from .loop import train

    record = train(job, strategy, out, on_step, placement, resume=resume, until=until)
    return record if placement.rank == 0 and placement.launcher != OWN else None


def _place(
    parent: int | None, nproc: int | None, starter: Launcher | None, launched: int | None
) -> Placement:
    """Return where this process stands: as a rank, or apart from any launcher, to start ranks."""
    placement = find_placement(started_by_hybrid=parent is not None)
    if launched:
        require_launched(placement, launched)
        return dataclasses.replace(placement, launched=True)
    return Placement() if starter else set_apart(placement, nproc)


def _follow(
    job: Job, strategy: str, out: Path, placement: Placement
) -> Callable[[StepRecord, int], None] | None:
    """Keep the log of another launcher's rank; return what shows the steps, on rank 0."""
    redirect_output(out / "logs", placement)
    if placement.rank > 0:
        return None
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
    starter: Launcher | None,
) -> Record:
    """Check the job, then start its ranks and show their progress.

    Where the folder has the whole run that is to go on, its record is returned."""
    choice = resolve(job, strategy)
    nproc = check_early(job, [strategy], nproc, alone=True, here=starter is None)
    check_start(out, resume)
    checked = check_apart(job, modules_of(choice, starter)).require()
    remove_stale_locks()
    layout, warnings = checked.plan(strategy, nproc)
    check_started(1 if starter else layout.world_size)
    found = checked.warnings(strategy)
    print_warnings([*(f"{strategy}: {line}" for line in warnings), *found])
    emulating = choice.strategy == "local_sgd" and choice.job.strategy.local_sgd.emulate_replicas
    start = decide(out, resume, resolve(checked.job, strategy))
    tell_start(start)
    if start.ended:
        return start.ended
    known = [*found, *start.notes]
    watcher, world_size = Progress(), 1 if emulating else layout.world_size
    rest, chosen = (checked.job, strategy, world_size, out, watcher, None, starter), start.chosen
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
    program: Starter | None = None,
    warnings: Sequence[str] = (),
    cores_for: int | None = None,
    resume: Chosen | Path | None = None,
    until: int | None = None,
    comparison: str | None = None,
) -> Record:
    """Start `nproc` ranks of a checked job, wait for them and return the record.

    label: the run's name for the watcher, if not the strategy's. program: what starts a rank, else
    `PROGRAM`, or a launcher. warnings: of the try-out. cores_for: see `run_ranks`. resume: the
    checkpoint that the run goes on from, or its folder. until: see `train`; the record then says
    `interrupted`. Raises RunFailed with the first cause, and Stopped; the record says so."""
    label, choice = label or strategy, resolve(job, strategy)
    chosen = read_chosen(resume, choice) if isinstance(resume, Path) else resume
    file, warnings = _begin(out, job, choice, chosen, label, comparison, warnings)
    watcher.started(label, job.train.steps or 0, out)
    options = {"--strategy": strategy, "--out": out, "--until": until}
    options["--resume"] = chosen.folder if chosen else None
    arguments = ["train", as_word(file), *_given(options)]
    try:
        _run(job, program, choice, nproc, arguments, out, watcher, _cores_for(choice, cores_for))
        record = _read_result(out, program)
        record = add_warnings(out, record, [x for x in warnings if x not in record.warnings])
    except BaseException as raised:
        error = _explained(raised, job, strategy, nproc, out)
        record = end_run(out, choice, nproc, error, warnings)
        if isinstance(error, RunFailed):
            ends = ends_command(error, comparison is not None, chosen is not None)
            watcher.refused(label) if ends else watcher.finished(label, record)
        raise error from None
    watcher.finished(label, record)
    return record


def modules_of(choice: Choice, program: Starter | None) -> Sequence[str]:
    """Return what a warm process imports for ranks that are forked from it."""
    if isinstance(program, Launcher):
        return ()
    return registry.modules(choice.strategy, choice.job)


def _run(
    job: Job,
    program: Starter | None,
    choice: Choice,
    nproc: int,
    arguments: list[str],
    out: Path,
    watcher: Watcher,
    cores_for: int | None,
) -> None:
    """Run the ranks as processes of a launcher, or else of this one."""
    stops = choice.job.checkpoint.every is not None
    if not isinstance(program, Launcher):
        arguments = [*arguments, "--parent", str(os.getpid())]
        rest = program or PROGRAM, modules_of(choice, program), cores_for, stops
        run_ranks(nproc, arguments, out, watcher.poll, *rest, says_end=True)
        return
    arguments = [*arguments, "--launched", pack_job(to_dict(job), nproc)]
    run_by_launcher(program, nproc, arguments, out, watcher.poll, cores_for, stops)


def _read_result(out: Path, program: Starter | None) -> Record:
    """Return the record that rank 0 has left; raises LauncherFailed where it is not here."""
    record = records.read(Record, out / "record.json")
    if isinstance(program, Launcher) and record.status == "running":  # as this process began it
        message = (
            f"ended well, and rank 0 has left no result in {out / 'record.json'}: it must write to "
            "a file system that this host sees"
        )
        raise LauncherFailed(Failure(0, message, ""), program.name)
    return record


def _begin(
    out: Path,
    job: Job,
    choice: Choice,
    chosen: Chosen | None,
    label: str,
    comparison: str | None,
    warnings: Sequence[str],
) -> tuple[Path, list[str]]:
    """Begin a run's record and its steps; return its job's file, and warnings with lost steps."""
    file = begin_run(out, job, choice, chosen.folder if chosen else None, comparison)
    missing = keep_steps(out, chosen.folder, chosen.manifest.step) if chosen else []
    print_warnings(f"{label}: {line}" for line in missing)
    return file, [*warnings, *missing]


def _explained(
    error: BaseException, job: Job, strategy: str, nproc: int, out: Path
) -> BaseException:
    if isinstance(error, LauncherFailed):
        return error
    if isinstance(error, RunFailed):
        return RunFailed(explain(error.failure, job, strategy, nproc, out))
    return error


def _given(options: Mapping[str, Any]) -> list[str]:
    """Return the words of the options that have a value."""
    given = {key: as_word(v) if isinstance(v, Path) else str(v) for key, v in options.items()}
    return [w for key, word in given.items() if options[key] is not None for w in (key, word)]


def _cores_for(choice: Choice, given: int | None) -> int | None:
    """Return of how many ranks a process has the threads; None: of those that run.

    An emulation computes with the threads of a rank that it plays: more of them sum up in another
    order, and round otherwise."""
    if choice.strategy != "local_sgd":
        return given
    return choice.job.strategy.local_sgd.emulate_replicas or given
