"""This module tries out the first samples of a job's data sets before any process starts."""

from collections.abc import Sequence
from typing import Any

from torch.utils._pytree import tree_map

from ..job.errors import JobError, RunError
from ..job.schema import Job
from .collation import collate, load_rows
from .forms import split_sample
from .samples import JobSet
from .seeds import generator_states, kept_generators, same_states, seed_generators

FEW = 4  # samples of each set


def check_samples(job: Job, train: Sequence[Any], test: Sequence[Any]) -> Any:
    """Returns the input of the train set's first sample, with which layers can be tried out.

    Raises JobError, which names the set and the sample, where one of the first samples of either
    set cannot be read, has no form that is valid, or does not fit together with the others."""
    for side, samples in zip(("train", "test"), (train, test), strict=True):
        try:
            load_rows(_named(job, side, samples), range(min(FEW, len(samples))), 0, 0, False)
        except RunError as error:
            raise JobError(str(error)) from error
    first = _named(job, "train", train)
    if first.collate is None:
        return split_sample(first[0])[0]
    batch, _ = load_rows(first, [0], 0, 0, False, targets=False)
    return tree_map(lambda tensor: tensor[0], batch)


def _named(job: Job, side: str, samples: Any) -> JobSet:
    """Returns a set by the job's name for it, also where `build_data` gives it as it is."""
    if isinstance(samples, JobSet):
        return samples
    return JobSet(samples, f"data.name = {job.data.name!r}", side, job.train.seed)


def collate_warnings(train: Any) -> list[str]:
    """Returns a line where the collate function draws random numbers.

    These hang on all samples of a micro-batch, so they differ between strategies that cut batches
    differently. What a set draws for one sample does not."""
    if not isinstance(train, JobSet) or train.collate is None:
        return []
    with kept_generators():
        ids = range(min(FEW, len(train)))
        rows = train.read(ids, 0)
        seed_generators(0)
        before = generator_states()
        collate(train, rows, ids)
        if same_states(before, generator_states()):
            return []
    return [
        f"{train.named}: collate draws random numbers, which hang on the whole micro-batch: "
        "strategies that cut batches differently train on other data; draw them in __getitem__"
    ]
