"""This module turns sample ids into the micro-batches that an engine trains on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from ..job.errors import RunError


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Holds `input` and `target` of one micro-batch, sample by sample along axis 0.

    `ids`, int64 [n], are the ids of its samples. Rows after the n-th are padding, which no loss or
    count ever sees. A part that the process does not need is None. `num_targets` is how many of
    its targets count, where that is known before they are loaded."""

    input: Any
    target: Any
    ids: torch.Tensor
    num_targets: int | None = None


def load_micro_batch(
    samples: Sequence[Any],
    ids: list[int],
    size: int | None = None,
    *,
    inputs: bool = True,
    targets: bool = True,
    targets_per_sample: int | None = None,
) -> MicroBatch:
    """Loads the samples `ids` as tensors, padded to `size` rows with copies of the first sample.

    With `size` None, only a micro-batch without samples is padded, to one row, since layers need
    not accept an empty batch. Without `inputs` or `targets` that part is None; without both, no
    sample is read. targets_per_sample: how many each has, where the set tells it."""
    count = None if targets_per_sample is None else targets_per_sample * len(ids)
    padding = (max(1, len(ids)) if size is None else size) - len(ids)
    numbers = torch.from_numpy(numpy.array(ids, dtype=numpy.int64))
    if not (inputs or targets):
        return MicroBatch(None, None, numbers, count)
    base, places = find_base(samples, [*ids, *[0] * padding] if padding else ids)
    index = numbers if places is ids else torch.from_numpy(numpy.array(places, dtype=numpy.int64))
    loaded = _select(base, index, inputs, targets)
    if loaded is None:
        loaded = _collate(_read_rows(base, places, padding), inputs, targets)
    return MicroBatch(*loaded, numbers, count)


def reader_of(samples: Any) -> type:
    """Returns the class that says how a set reads its samples, one by one or several at once.

    A derived class may read others than its base's `__getitems__` gives. Nor is a set asked that
    hands on what it lacks to another set, which it may change sample by sample."""
    ways = {"__getitem__", "__getitems__"}
    return next((c for c in type(samples).__mro__ if ways & vars(c).keys()), object)


def find_base(samples: Any, ids: list[int]) -> tuple[Any, list[int]]:
    """Returns the set that torch's `Subset`s are taken from, and the places of `ids` in it."""
    while reader_of(samples) is Subset:
        ids = [samples.indices[i] for i in ids]
        samples = samples.dataset
    return samples, ids


def _select(base: Any, index: torch.Tensor, inputs: bool, targets: bool) -> tuple[Any, Any] | None:
    """Takes the rows out of a set of two plain tensors at once; None where the set is another one.

    `default_collate` makes the same of single rows, one by one. index: the places, int64 [n]."""
    if reader_of(base) is not TensorDataset:
        return None
    for tensor in base.tensors:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return None
    # Negative places are huge as unsigned ones; the set itself counts those from the end, or says
    # what is not there.
    if index.numpy().view(numpy.uint64).max(initial=0) >= len(base):
        return None
    first, second = base.tensors  # another number of them is an error, as it is of single rows
    return (
        first.index_select(0, index.to(first.device)) if inputs else None,
        second.index_select(0, index.to(second.device)) if targets else None,
    )


def _read_rows(base: Any, places: list[int], padding: int) -> list[Any]:
    """Reads whole rows, by torch's `__getitems__` where the set has it.

    The first sample is read once, however often it pads. Raises RunError where the set gives
    another number of rows than it was asked for."""
    repeats = max(0, padding - 1)
    places = places[: len(places) - repeats]
    if vars(reader_of(base)).get("__getitems__"):
        rows = list(base.__getitems__(places))
        if len(rows) != len(places):
            raise RunError(f"the set's __getitems__ gave {len(rows)} of {len(places)} samples")
    else:
        rows = [base[i] for i in places]
    return rows + rows[-1:] * repeats


def _collate(rows: list[Any], inputs: bool, targets: bool) -> tuple[Any, Any]:
    """Puts rows of (input, target) together."""
    return (
        default_collate([x for x, _ in rows]) if inputs else None,
        default_collate([y for _, y in rows]) if targets else None,
    )
