"""This package holds the data sets; `hybrid.data.batches` decides the order of the batches.

A data function takes the job's `data.options` as keyword arguments and returns `(train, test)`: two
map-style data sets of `(input, target)`, the same on every rank. A set may also have torch's
`__getitems__`, which gives several samples at once, and say its `targets_per_sample`."""

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

    Raises JobError where the name, the options or the sets are wrong."""
    given = f"data.name = {job.data.name!r}"
    built = call_named("data", job.data.name, job.data.options, SOURCES)
    if not (isinstance(built, tuple) and len(built) == 2):
        raise JobError(f"{given}: must return (train, test)")
    for name, samples in zip(("train", "test"), built, strict=True):
        if not (hasattr(samples, "__getitem__") and hasattr(samples, "__len__")):
            raise JobError(f"{given}: the {name} set needs a length and indexing")
        if len(samples) == 0:
            raise JobError(f"{given}: the {name} set is empty")
    return built
