"""This package holds the data sets; `hybrid.data.batches` decides the order of the batches.

A data function takes the job's `data.options` as keyword arguments and returns `(train, test)` or
`(train, test, collate)`, the same on every rank. `hybrid.data.forms` says what a sample may be. A
set may also have torch's `__getitems__`, which gives several samples at once, and say its
`targets_per_sample`."""

from collections.abc import Sequence
from typing import Any

from ..job.errors import JobError
from ..job.imports import call_named
from ..job.schema import Job

SOURCES = {
    "random": "hybrid.data.random:random",
    "mnist": "hybrid.data.mnist:mnist",
    "text": "hybrid.data.text:text",
}


def build_data(job: Job) -> tuple[Sequence[Any], Sequence[Any]]:
    """Builds the job's train and test sets.

    A set of a user's own comes as a `JobSet`, with the collate function; sets of tensors that torch
    collates come as they are. Raises JobError where the name, the options or the sets are wrong."""
    from .samples import check_set, job_sets  # torch comes with it

    given = f"data.name = {job.data.name!r}"
    built = call_named("data", job.data.name, job.data.options, SOURCES)
    if not (isinstance(built, (tuple, list)) and len(built) in (2, 3)):
        raise JobError(f"{given}: must return (train, test) or (train, test, collate)")
    collate = built[2] if len(built) == 3 else None
    if collate is not None and not callable(collate):
        kind = type(collate).__name__
        raise JobError(f"{given}: collate, the third it returns, must be a function, not a {kind}")
    for side, samples in zip(("train", "test"), built, strict=False):
        check_set(f"{given}: the {side} set", samples)
    if job.data.name in SOURCES:
        return built[0], built[1]
    return job_sets(given, job.train.seed, built[0], built[1], collate)
