"""This module turns sample ids into the micro-batches that an engine trains on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data import TensorDataset

from .collation import load_rows
from .forms import collate_rows
from .samples import JobSet, find_base, read_together, reader_of, reads_together


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

    def pin_memory(self) -> "MicroBatch":
        """Returns it with inputs and targets in memory from which a GPU copies at once."""
        parts = self.input, self.target
        inputs, target = tree_map(lambda t: None if t is None else t.pin_memory(), parts)
        return dataclasses.replace(self, input=inputs, target=target)

    def copied(self) -> "MicroBatch":
        """Returns it with copies of inputs and targets, for a pass beside the one that trains.

        A model may change its input in place, and a loss its target."""
        inputs, target = copied((self.input, self.target))
        return dataclasses.replace(self, input=inputs, target=target)


def copied(value: Any) -> Any:
    """Returns a nesting of tuples, lists and dicts with copies of its tensors."""
    return tree_map_only(torch.Tensor, torch.Tensor.clone, value)


def was_changed(value: Any) -> bool:
    """Tells whether a tensor in what `copied` returned was changed in place since."""
    return any(leaf._version for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def load_micro_batch(
    samples: Sequence[Any],
    ids: list[int] | torch.Tensor,
    size: int | None = None,
    *,
    inputs: bool = True,
    targets: bool = True,
    targets_per_sample: int | None = None,
    epoch: int = 0,
) -> MicroBatch:
    """Loads the samples `ids` as tensors, padded to `size` rows with copies of the first sample.

    ids: a list, or int64 [n], which the micro-batch then has. With `size` None, only a micro-batch
    without samples is padded, to one row, since layers need not accept an empty batch. Without
    `inputs` or `targets` that part is None; without both, no sample is read. targets_per_sample:
    how many each has, where the set tells it. epoch: what a set of `build_data` draws for a sample
    hangs on the epoch. Raises RunError, with the name of the sample, where such a set cannot give
    it."""
    numbers = ids if isinstance(ids, torch.Tensor) else _as_tensor(ids)
    rows = numbers.shape[0]
    count = None if targets_per_sample is None else targets_per_sample * rows
    padding = (max(1, rows) if size is None else size) - rows
    if not (inputs or targets):
        return MicroBatch(None, None, numbers, count)
    if not padding and (loaded := _select(samples, numbers, inputs, targets)) is not None:
        return MicroBatch(*loaded, numbers, count)
    ids = numbers.tolist()
    if isinstance(samples, JobSet):
        fixed = size is not None
        loaded = load_rows(samples, ids, padding, epoch, fixed, inputs, targets)
        return MicroBatch(*loaded, numbers, count)
    base, places = find_base(samples, [*ids, *[0] * padding] if padding else ids)
    loaded = _select(base, _as_tensor(places), inputs, targets)
    if loaded is None:
        loaded = collate_rows(_read_rows(base, places, padding), inputs, targets)
    return MicroBatch(*loaded, numbers, count)


def _as_tensor(ids: list[int]) -> torch.Tensor:
    """Return a list of ids, or of places, as int64 [n]."""
    return torch.from_numpy(numpy.array(ids, dtype=numpy.int64))  # faster than torch's own


def _select(base: Any, index: torch.Tensor, inputs: bool, targets: bool) -> tuple[Any, Any] | None:
    """Takes the rows out of a set of two plain tensors at once; None where the set is another one.

    `default_collate` makes the same of single rows, one by one. index: the places, int64 [n]."""
    if reader_of(base) is not TensorDataset:
        return None
    for tensor in base.tensors:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided:
            return None
        if not tensor.is_cpu and not _all_in(tensor, index):
            return None
    first, second = base.tensors  # another number of them is an error, as it is of single rows
    try:
        return _take(first, index) if inputs else None, _take(second, index) if targets else None
    except (IndexError, RuntimeError):  # as torch has it, by the shape
        return None  # the set counts negative places from the end, or says what is not there


def _take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tensor.index_select(0, index if tensor.is_cpu else index.to(tensor.device))


def _all_in(tensor: torch.Tensor, index: torch.Tensor) -> bool:
    """Tell whether a tensor has all places: a GPU's process ends where one is not there."""
    # Negative places are huge as unsigned ones.
    return bool(index.numpy().view(numpy.uint64).max(initial=0) < len(tensor))


def _read_rows(base: Any, places: list[int], padding: int) -> list[Any]:
    """Reads whole rows, by torch's `__getitems__` where the set has it.

    The first sample is read once, however often it pads."""
    repeats = max(0, padding - 1)
    places = places[: len(places) - repeats]
    rows = read_together(base, places) if reads_together(base) else [base[i] for i in places]
    return rows + rows[-1:] * repeats
