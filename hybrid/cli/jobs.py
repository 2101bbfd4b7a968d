"""This module looks at what a launcher says and loads the job, as several commands begin.

It also has the command that plays a rank of a job: dry-run."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..job.arguments import JobFile, Json, KnownBad, Overrides, TrustPickle, whole_number
from ..job.errors import JobError

# The commands that a launcher may start, or whose libraries read its variables.
READERS = {"compare", "train", "check", "doctor", "eval", "export", "sample", "generate"}


def check_surroundings(command: str | None) -> None:
    """Raise JobError where the working folder is gone, or a launcher's variables make no sense.

    The variables of our own ranks are looked at when they find their place."""
    if command in ("strategies", None) or "--help" in sys.argv:
        return
    try:
        os.getcwd()
    except OSError as error:
        words = "valid: a working folder that is there"
        raise JobError(f"the working folder is gone ({error.strerror}); {words}") from None
    if command in READERS and "--parent" not in sys.argv:
        from ..launch.variable_check import check_variables

        check_variables()


def num_launched(launched: str | None) -> int | None:
    """Return how many processes `hybrid` had a launcher start, this one among them, if it did."""
    from ..launch.by_launcher import unpack_job

    return unpack_job(launched)[1] if launched else None


def load(
    path: Path,
    overrides: list[str] | None,
    allow_known_bad: bool,
    trust_pickle: bool,
    launched: str | None = None,
) -> Any:
    """Load the job of a command line; raises JobError.

    launched: the job itself, where `hybrid` had a launcher start this process."""
    from ..data import SOURCES
    from ..job.file import load_job
    from ..job.imports import check_name
    from ..launch.by_launcher import unpack_job
    from ..models import check_model_name

    allowed = ["launch.allow_known_bad=true"] if allow_known_bad else []
    allowed += ["launch.trust_pickle=true"] if trust_pickle else []
    source = unpack_job(launched)[0] if launched else path
    job = load_job(source, [*(overrides or []), *allowed])
    check_model_name(job.model.name)
    check_name("data", job.data.name, SOURCES)
    return job


def dry_run(
    job: JobFile,
    strategy: Annotated[str, typer.Option(help="A strategy's name, or that of a variant.")],
    world: Annotated[
        int, typer.Option(parser=whole_number, metavar="N", help="Ranks of the job; 1 to 16384.")
    ],
    rank: Annotated[
        int, typer.Option(parser=whole_number, metavar="R", help="The one to play.")
    ] = 0,
    overrides: Overrides = None,
    allow_known_bad: KnownBad = False,
    trust_pickle: TrustPickle = False,
    json: Json = False,
) -> None:
    """Play one rank of a job of any size here, without data: its shards, collectives, memory."""
    from .. import records
    from ..job.shown import printable
    from ..launch.endings import say, tell
    from ..training.dry_run import dry_run as play
    from . import put

    result = play(load(job, overrides, allow_known_bad, trust_pickle), strategy, world, rank)
    for line in result.warnings:
        tell(f"warning: {line}")
    shown = "\n".join(printable(line) for line in result.lines() if not json)
    if json or result.refused is None:
        put(records.dumps(result) if json else shown)
    raise typer.Exit(0 if result.refused is None else say(result.refused, 2))
