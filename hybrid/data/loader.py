"""This module turns sample ids into the micro-batches that an engine trains on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Holds `input` and `target` of one micro-batch, sample by sample along axis 0.

    `ids`, int64 [n], are the ids of its samples. Rows after the n-th are padding, which no loss or
    count ever sees."""

    input: Any
    target: Any
    ids: torch.Tensor


def load_micro_batch(samples: Sequence[Any], ids: list[int], size: int | None = None) -> MicroBatch:
    """Loads the samples `ids` as tensors, padded to `size` rows with copies of the first sample.

    With `size` None, only a micro-batch without samples is padded, to one row, since layers need
    not accept an empty batch."""
    rows = [samples[i] for i in ids]
    missing = (size if size is not None else max(1, len(ids))) - len(ids)
    rows += [samples[0]] * missing
    inputs, targets = default_collate(rows)
    return MicroBatch(inputs, targets, torch.tensor(ids, dtype=torch.int64))
