"""Evaluates the weights of a checkpoint as a run does, under any strategy: `hybrid eval`.

The ranks start as those of a run do: by a launcher, or by this command. They load weights alone;
the optimizer's state is neither read nor made. `hybrid.training.evaluating_ranks` is what they do;
this module imports no torch, so that what cannot be evaluated is refused soon."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from .. import records
from ..job.errors import JobError, needs_room
from ..job.file import to_dict
from ..job.outputs import as_word
from ..job.variants import resolve
from ..launch.devices import check_gpus, gpus_hidden
from ..launch.limits import check_processes
from ..launch.local import run_ranks
from ..launch.logs import redirect_output
from ..launch.ops_cache import remove_stale_locks
from ..launch.orphans import end_with_launcher
from ..launch.placement import OWN, Placement, export_rank_variables, find_placement, set_apart
from ..launch.threads import set_num_threads
from ..launch.warm import warm_ranks
from ..records.whole import remove_parts
from ..strategies import registry
from .check import print_warnings
from .claiming import EVAL_JOB as JOB
from .claiming import EVAL_RESULT as RESULT
from .early import count_processes, has_degrees
from .saved import JobFrom, Saved, find_saved


@dataclasses.dataclass(frozen=True)
class Asked:
    """Holds what `hybrid eval` was asked for: of which weights, under which strategy, where to."""

    path: Path
    strategy: str
    given: JobFrom
    out: Path
    nproc: int | None = None
    parent: int | None = None  # the process id of the `hybrid` that started this rank
    fresh_ranks: bool = False


def evaluate_saved(asked: Asked) -> dict[str, Any] | None:
    """Evaluate on the ranks of a launcher, or on ranks that this process starts.

    Writes `OUT/eval.json` and returns it in the process that shows it, None in the others. Raises
    JobError, Unsupported, RunFailed, NoRoom or the run's error."""
    found = find_placement(started_by_hybrid=asked.parent is not None)
    placement = set_apart(found, asked.nproc)
    if placement.launcher is None:
        with needs_room(asked.out), warm_ranks(asked.fresh_ranks):
            return _launch(asked)
    end_with_launcher(asked.parent)
    if asked.nproc not in (None, placement.world_size):
        world = placement.world_size
        raise JobError(f"--nproc {asked.nproc}: the launcher started {world} processes")
    saved = _find_here(asked, placement)
    registry.check_settings(saved.job, [asked.strategy])
    from .evaluating_ranks import evaluate_and_clean_up  # torch comes with it

    placement = registry.place(saved.job, asked.strategy, placement)
    export_rank_variables(placement)
    if placement.launcher != OWN:
        redirect_output(asked.out / "logs", placement)
    set_num_threads(placement)
    result = evaluate_and_clean_up(saved, asked.strategy, asked.out, placement)
    return result if placement.rank == 0 and placement.launcher != OWN else None


def _find_here(asked: Asked, placement: Placement) -> Saved:
    """Return what this rank's host has of the checkpoint; a JobError names that host."""
    try:
        return find_saved(asked.path, asked.given, verified=placement.launcher == OWN)
    except JobError as error:
        if placement.rank == 0 or placement.launcher == OWN:
            raise
        raise JobError(f"{error} (rank {placement.rank} on {placement.host})") from None


def _launch(asked: Asked) -> dict[str, Any]:
    """Verify the checkpoint, start the ranks, and return what they have written."""
    if asked.nproc is not None:
        check_processes(asked.nproc, "--nproc")
    saved = find_saved(asked.path, asked.given)
    print_warnings(saved.notes)
    job, strategy = saved.job, asked.strategy
    registry.check_settings(job, [strategy])
    choice = resolve(job, strategy)
    nproc = count_processes(job, [strategy], asked.nproc)
    layout = registry.get(choice.strategy).layout(choice.job, nproc)
    check_gpus(job.launch.device, layout.world_size, has_degrees(job, [strategy]))
    remove_stale_locks()
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / RESULT).unlink(missing_ok=True)
    remove_parts(asked.out / RESULT, asked.out / JOB)
    file = asked.out / JOB
    records.write(to_dict(job), file)
    arguments = ["eval", as_word(saved.folder), "--job", as_word(file), "--strategy", strategy]
    arguments += ["--out", as_word(asked.out), "--parent", str(os.getpid())]
    try:
        modules = registry.modules(choice.strategy, choice.job)
        with gpus_hidden(job.launch.device):
            run_ranks(layout.world_size, arguments, asked.out, modules=modules, says_end=True)
    finally:
        file.unlink(missing_ok=True)
    result: dict[str, Any] = records.read(dict[str, Any], asked.out / RESULT)
    return result
