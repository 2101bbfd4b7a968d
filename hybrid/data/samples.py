"""This module reads the samples of a job's data sets, and names the sample whose reading fails.

It has the class of a data set as the job uses it: with its name, its seed and its collate function.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Subset, TensorDataset

from ..job.errors import JobError, RunError, tell_error
from ..job.users_code import passes
from .seeds import (
    STREAMS,
    generator_states,
    kept_generators,
    same_states,
    sample_seed,
    seed_generators,
)

Collate = Callable[[list[Any]], Any]


@dataclasses.dataclass(eq=False)
class Longest:
    """Holds the rows that make each axis of a collated batch as long as it ever is in a job.

    rows: None until `hybrid.data.fixed_shapes` has found them. shapes: of what they collate to,
    without the axis of the samples."""

    sets: list["JobSet"] = dataclasses.field(default_factory=list)
    rows: list[Any] | None = None
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class JobSet:
    """Is one data set of a job; it gives the set's own samples and hands on its other attributes.

    named: what the job calls it. side: one of `seeds.STREAMS`. seed: the job's. collate: the
    user's, which makes a batch of a list of samples. Reading a sample draws random numbers under a
    seed of its own; those of the process stay as they are."""

    samples: Any
    named: str
    side: str
    seed: int
    collate: Collate | None = None
    longest: Longest = dataclasses.field(default_factory=Longest)
    draws_together: bool = False  # its `__getitems__` has drawn random numbers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        with kept_generators():
            return self.read([i], 0)[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name == "samples" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.samples, name)

    def read(self, ids: Sequence[int], epoch: int) -> list[Any]:
        """Return samples as the set gives them in an epoch; leaves the generators seeded.

        Raises RunError, which names the sample, and the line of the user's own file."""
        base, places = find_base(self.samples, list(ids))
        read = functools.partial(operator.getitem, base)
        if type(base) in (list, tuple):  # these draw nothing
            return [self._one(read, i, place) for i, place in zip(ids, places, strict=True)]
        seeds = [sample_seed(self.seed, self.side, epoch, i) for i in ids]
        if not reads_together(base):
            return self._each(read, ids, places, seeds)
        if not self.draws_together and places:
            rows = self._together(base, places, seeds[0])
            if rows is not None:
                return rows
        return self._each(lambda place: read_together(base, [place])[0], ids, places, seeds)

    def _each(
        self,
        read: Callable[[int], Any],
        ids: Sequence[int],
        places: Sequence[int],
        seeds: Sequence[int],
    ) -> list[Any]:
        rows = []
        for i, place, seed in zip(ids, places, seeds, strict=True):
            seed_generators(seed)
            rows.append(self._one(read, i, place))
        return rows

    def _one(self, read: Callable[[int], Any], i: int, place: int) -> Any:
        try:
            return read(place)
        except BaseException as error:  # a user's data set may raise anything
            if passes(error):
                raise
            raise self.error(f"{self.side} sample {i}", error) from error

    def _together(self, base: Any, places: list[int], seed: int) -> list[Any] | None:
        """Read several samples by one call; None where they must be read one by one.

        That is so where numbers are drawn, which must not hang on the other samples of the call,
        and after an error, of which the sample is to be found."""
        seed_generators(seed)
        before = generator_states()
        try:
            rows = read_together(base, places)
        except Exception:
            return None
        self.draws_together = not same_states(before, generator_states())
        return None if self.draws_together else rows

    def error(self, what: str, error: BaseException) -> RunError:
        """Return the error in one line: the set's name, what failed, why, and the user's line."""
        return RunError(f"{self.named}: {what}: {tell_error(error)}")


def reader_of(samples: Any) -> type:
    """Returns the class that says how a set reads its samples, one by one or several at once.

    A derived class may read others than its base's `__getitems__` gives. Nor is a set asked that
    hands on what it lacks to another set, which it may change sample by sample."""
    kind: Any = type(samples)  # not its `__class__`, which a set that stands for another may hide
    return _reader_of(kind)


@functools.cache
def _reader_of(kind: type) -> type:
    ways = {"__getitem__", "__getitems__"}
    return next((c for c in kind.__mro__ if ways & vars(c).keys()), object)


def find_base(samples: Any, ids: list[int]) -> tuple[Any, list[int]]:
    """Returns the set that torch's `Subset`s are taken from, and the places of `ids` in it."""
    while (reader := reader_of(samples)) in (Subset, JobSet):
        if reader is JobSet:
            samples = samples.samples
        else:
            ids = [samples.indices[i] for i in ids]
            samples = samples.dataset
    return samples, ids


def reads_together(base: Any) -> bool:
    """Tells whether the set reads several samples at once, by torch's `__getitems__`."""
    return vars(reader_of(base)).get("__getitems__") is not None


def read_together(base: Any, places: list[int]) -> list[Any]:
    """Reads samples by the set's `__getitems__`; RunError where it gives another number of them."""
    rows = list(base.__getitems__(places))
    if len(rows) != len(places):
        raise RunError(f"the set's __getitems__ gave {len(rows)} of {len(places)} samples")
    return rows


def check_set(what: str, samples: Any) -> None:
    """Raises JobError unless a set can be indexed and is not empty."""
    if isinstance(samples, DataLoader):
        raise JobError(f"{what} is a DataLoader; return its data set, the batches are made here")
    if not (hasattr(samples, "__getitem__") and hasattr(samples, "__len__")):
        raise JobError(f"{what} needs a length and indexing, not a {type(samples).__name__}")
    try:
        size = len(samples)
    except BaseException as error:  # a user's class, or one of torch's without a length
        if passes(error):
            raise
        raise JobError(f"{what} has no length: {tell_error(error)}") from error
    if size == 0:
        raise JobError(f"{what} is empty")


def job_sets(
    given: str, seed: int, train: Any, test: Any, collate: Collate | None
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Returns the train and the test set of a job, each as it is read.

    A `TensorDataset`, or a `Subset` of one, that torch collates has nothing to add to."""
    longest = Longest()
    longest.sets = [
        JobSet(samples, given, side, seed, collate, longest)
        for side, samples in zip(STREAMS, (train, test), strict=True)
    ]
    found: list[Any] = [
        one.samples
        if collate is None and reader_of(find_base(one, [])[0]) is TensorDataset
        else one
        for one in longest.sets
    ]
    return found[0], found[1]
