"""Plays one rank of a job of any size in one process: `hybrid dry-run`. No data is sent.

The strategy's own engine runs three optimizer steps on tensors without values
(`hybrid.measure.valueless`) in a fake process group (`hybrid.launch.played`). What is reported is
read off the live engine and counted by the instruments of a real run; nothing comes from a
formula."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

from ..job.errors import JobError, Unsupported, tell_error
from ..job.reading import show
from ..job.schema import Job
from ..job.traces import line_outside, users_line
from ..job.variants import Choice, resolve, warnings_of
from ..layout import LayoutError
from ..records.dry_run import DryRun
from ..strategies import registry

MOST_RANKS = 2**14  # of a run of which one rank is played
# Why some engines cannot be played, as was seen with DeepSpeed 0.19.8 and torch 2.13.
UNPLAYED = {
    "hybrid.engines.zero": "DeepSpeed's ZeRO decides by values, which a dry-run has not: it reads "
    "the norm before each update, and ZeRO-3 compares lists that other ranks send",
    "hybrid.engines.pipeline_deepspeed": "a DeepSpeed pipeline reads the shapes of activations out "
    "of messages from the stage before, and nobody sends them in a dry-run",
    "hybrid.engines.pipeline_torch": "torch's pipelines learn the shapes of activations from the "
    "stage before, and nobody sends them in a dry-run",
}


def dry_run(job: Job, name: str, world: int, rank: int = 0) -> DryRun:
    """Play one rank of `world` under a strategy or variant, and return what it holds and sends.

    A job that the strategy refuses, or that cannot be played, has the reason in `refused`. Raises
    JobError where the job or a number is wrong, and CheckFailed where the job's own code raises
    while it is checked."""
    _check_place(world, rank)
    registry.check_settings(job, [name])
    result = DryRun(name, world, rank)
    try:
        layout, _ = registry.find_layout(job, name, world)
        if layout.world_size != world:
            only = f"--world {world}: {name} runs on {layout.world_size} process"
            raise JobError(f"{only}; valid: {layout.world_size}")
        return _check_and_play(job, result)
    except LayoutError as error:
        raise JobError(f"{error} (--world {world})") from None
    except Unsupported as error:
        return dataclasses.replace(result, refused=str(error))


def _check_place(world: int, rank: int) -> None:
    if not 1 <= world <= MOST_RANKS:
        raise JobError(f"--world {show(world)}: valid: 1 to {MOST_RANKS}")
    if not 0 <= rank < world:
        raise JobError(f"--rank {show(rank)}: no rank of --world {world}; valid: 0 to {world - 1}")


def _check_and_play(job: Job, result: DryRun) -> DryRun:
    """Check the job as before a run, and play it; raises Unsupported with the reason if not."""
    from ..data import build_data
    from .check import check_job

    data = build_data(job)
    checked = check_job(job, data)
    layout, found = checked.plan(result.strategy, result.world)
    found = [*warnings_of(job, [result.strategy]), *found, *checked.warnings(result.strategy)]
    result = dataclasses.replace(result, layout=layout.to_dict(), warnings=found)
    choice = resolve(checked.job, result.strategy)
    try:
        _require_playable(choice, bool(checked.summary.batch_norms))
        return _play(choice, data, result)
    except Unsupported as error:
        return dataclasses.replace(result, refused=str(error))


def _require_playable(choice: Choice, batch_norms: bool) -> None:
    """Raise Unsupported for what runs on a cluster, but not without values."""
    job, engine = choice.job, registry.engine(choice.strategy, choice.job)
    if reason := UNPLAYED.get(engine):
        raise Unsupported(f"{choice.name} cannot be played: {reason}")
    settings = {
        "train.precision = 'fp16': the loss scale is read": job.train.precision == "fp16",
        "[guard] reads the norm of the gradients": job.guard is not None,
        "batch norm moves buffers, by whose values ranks know which to send": (
            batch_norms and engine == "hybrid.engines.accelerated"
        ),
        "train.compile = true: compiled code hides its tensors": job.train.compile,
    }
    for what, asked in settings.items():
        if asked:
            raise Unsupported(f"{choice.name} cannot be played: {what}, which a dry-run cannot do")


def _play(choice: Choice, data: tuple[Sequence[Any], Sequence[Any]], result: DryRun) -> DryRun:
    """Play the rank; raises Unsupported where that cannot be done without values."""
    from ..measure.valueless import Unread
    from .playing import play

    cannot = f"{choice.name} cannot be played"
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, for its own developers
            return play(choice, data, result)
    except (JobError, ModuleNotFoundError):
        raise
    except Unsupported as error:
        raise Unsupported(f"{cannot}: {error}") from error
    except Unread as error:
        where = users_line(error) or line_outside(error, "torch", "measure")
        raise Unsupported(f"{cannot}: {where} reads the value of a tensor") from error
    except Exception as error:
        raise Unsupported(f"{cannot}: {tell_error(error)}") from error
