"""Evaluates the weights of a checkpoint as a run does, under any strategy: `hybrid eval`.

The ranks start as those of a run do: by a launcher, or by this command. They load weights alone;
the optimizer's state is neither read nor made."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import records
from ..checkpoint.pieces import WEIGHT
from ..data import build_data
from ..engines.protocol import Engine
from ..job.errors import JobError, PeerFailed, RunError, needs_room
from ..job.file import to_dict
from ..job.outputs import as_word
from ..job.schema import Job, resolve_lengths
from ..job.variants import Choice, resolve
from ..launch.devices import check_gpus, gpus_hidden
from ..launch.environment import restored_environment
from ..launch.exchange import gather_objects
from ..launch.failures import RankStatus, leave_error
from ..launch.limits import check_processes
from ..launch.local import run_ranks
from ..launch.logs import redirect_output
from ..launch.ops_cache import remove_stale_locks
from ..launch.orphans import end_with_launcher
from ..launch.placement import OWN, Placement, export_rank_variables, find_placement, set_apart
from ..launch.process_group import cleanup
from ..launch.threads import set_num_threads
from ..launch.warm import warm_ranks
from ..models.shared import build_shared
from ..models.starting import fill, match_names, require_fit
from ..models.vector_functions import call_vector_functions_once
from ..records.whole import remove_parts
from ..strategies import registry
from .beginning import meet
from .check import print_warnings
from .claiming import EVAL_JOB as JOB
from .claiming import EVAL_RESULT as RESULT
from .early import count_processes, has_degrees
from .evaluation import evaluate
from .leaving import as_failure
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
    placement = registry.place(saved.job, asked.strategy, placement)
    export_rank_variables(placement)
    if placement.launcher != OWN:
        redirect_output(asked.out / "logs", placement)
    set_num_threads(placement)
    result = _evaluate_and_clean_up(saved, asked, placement)
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
        modules = registry.modules(choice.strategy)
        with gpus_hidden(job.launch.device):
            run_ranks(layout.world_size, arguments, asked.out, modules=modules, says_end=True)
    finally:
        file.unlink(missing_ok=True)
    result: dict[str, Any] = records.read(dict[str, Any], asked.out / RESULT)
    return result


@restored_environment()
def _evaluate_and_clean_up(saved: Saved, asked: Asked, placement: Placement) -> dict[str, Any]:
    """Evaluate, and leave nothing behind, whatever happens: the cause of an error comes first."""
    status = RankStatus(saved.job, placement, asked.out / "logs")
    try:
        with needs_room(asked.out):
            result = _evaluate(saved, asked, placement, status)
        status.end()
        return result
    except BaseException as raised:
        error = as_failure(raised)
        cause = leave_error(error, status)
        if cause is not None:
            raise PeerFailed(cause.describe()) from raised
        if error is not raised:
            raise error from raised
        raise
    finally:
        status.close()
        cleanup(status.failed)


def _evaluate(
    saved: Saved, asked: Asked, placement: Placement, status: RankStatus
) -> dict[str, Any]:
    call_vector_functions_once()
    choice = resolve(saved.job, asked.strategy)
    placement = meet(placement, choice.job, status)
    if len({str(found) for found in gather_objects(saved.describe())}) > 1:
        raise RunError("the ranks found different checkpoints, since a run saves there; name one")
    status.set("loading the data")
    data = build_data(choice.job)
    job = resolve_lengths(choice.job, len(data[0]))
    engine = _open(saved, choice, job, placement, data[0], status)
    gather_objects(None)  # ranks load for unlike times, for which the others wait longer
    status.hurry(in_step=not job.train.compile)
    status.set("in the evaluation")
    found = evaluate(engine, data[1], job, job.micro_batches(choice.strategy))
    result = {
        **records.to_dict(found),
        "strategy": choice.name,
        "layout": engine.layout.to_dict(),
        "world_size": placement.world_size,
        "checkpoint": saved.describe(),
    }
    engine.close()
    if placement.rank == 0:
        records.write(result, asked.out / RESULT)
    return result


def _open(
    saved: Saved,
    choice: Choice,
    job: Job,
    placement: Placement,
    train_set: Sequence[Any],
    status: RankStatus,
) -> Engine:
    """Build the engine, and put the weights into its live parts."""
    weights = saved.open()
    try:
        status.set("building the model")
        require_fit(job, weights)
        layers, loss = build_shared(job, placement)
        names = match_names(weights, layers)
        status.set("building the engine")
        engine = registry.open_engine(job, choice.strategy, layers, loss, placement, train_set)
        status.set("loading the weights")
        fill(weights, (piece for piece in engine.pieces() if piece.key == WEIGHT), names)
    finally:
        weights.close()
    scale = saved.manifest and saved.manifest.values["loss_scale"]
    engine.begin_at(saved.step or 0, scale, None)
    return engine
