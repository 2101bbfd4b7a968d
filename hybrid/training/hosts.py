"""This module finds out, before the first step, what the hosts of a run do not share.

Ranks that another launcher started may be on hosts without a common file system. What rank 0 writes
it reads alone, and what others need travels to them. Only the state of a run is read and written by
all ranks. And each host has its own copy of the job's file, which may be another one. Every rank
raises the same error, which names the rank and its host."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..job.errors import Refused
from ..job.file import flatten, to_dict
from ..job.reading import show
from ..job.schema import Job
from ..launch.exchange import gather_objects
from ..launch.placement import Placement
from .resume import Chosen, Start

SHARED = "a file system that all hosts share"


def check_hosts(
    job: Job, placement: Placement, out: Path | None, start: Start, until: int | None
) -> None:
    """Raise Refused where the hosts of a run do not share what it needs; collective.

    out: the run's folder. until: see `train`."""
    if placement.world_size == 1:
        return
    _require_same_job(job, placement)
    if start.ended:
        return
    if start.chosen:
        _require_seen(start.chosen, placement)
    if out is not None and (job.checkpoint.every is not None or until is not None):
        every = job.checkpoint.every
        given = f"checkpoint.every = {every}" if every is not None else f"--interrupt {until}"
        with _probe(out, placement) as name:
            unseen = [] if (out / name).exists() else [str(out)]
            _require(placement, unseen, given, f"an --out on {SHARED}, or no checkpoints")


def _require_same_job(job: Job, placement: Placement) -> None:
    """Raise Refused unless all ranks have the job of rank 0; collective."""
    hosts, jobs = zip(*gather_objects([placement.host, to_dict(job)]), strict=True)
    first = dict(flatten(jobs[0]))
    for rank, other in enumerate(jobs):
        there = dict(flatten(other))
        for key in sorted(first.keys() | there.keys()):
            if first.get(key) != there.get(key):
                raise Refused(
                    f"{key} = {show(there.get(key))}: in the job of rank {rank} on {hosts[rank]}; "
                    f"rank 0 on {hosts[0]} has {show(first.get(key))}; valid: one job"
                )


def _require_seen(chosen: Chosen, placement: Placement) -> None:
    """Raise Refused unless all ranks see the checkpoint that the run goes on from; collective."""
    files = chosen.manifest.values["files"]
    unseen = [name for name in sorted(files) if not _sees(chosen.folder / name, files[name])]
    valid = f"{SHARED}, or the same folder on each host"
    _require(placement, unseen[:1], f"--resume {chosen.folder}", valid)


def _sees(path: Path, entry: Any) -> bool:
    try:
        return path.stat().st_size == entry["bytes"]
    except OSError:
        return False


@contextlib.contextmanager
def _probe(out: Path, placement: Placement) -> Iterator[str]:
    """Have rank 0 make a file with a new name in the run's folder while this lasts; collective."""
    with contextlib.ExitStack() as stack:
        name = ""
        if placement.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=out, prefix=".shared-"))
            name = Path(file.name).name
        yield gather_objects(name)[0]


def _require(placement: Placement, unseen: list[str], given: str, valid: str) -> None:
    """Raise Refused on all ranks if one of them does not see a path; collective."""
    answers = gather_objects([placement.host, unseen])
    for rank, (host, paths) in enumerate(answers):
        if paths:
            raise Refused(
                f"{given}: rank {rank} on {host} does not see {paths[0]} of rank 0 on "
                f"{answers[0][0]}; valid: {valid}"
            )
