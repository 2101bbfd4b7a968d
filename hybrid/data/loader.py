"""Turns sample ids into the micro-batches that an engine trains on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """`input` and `target` of one micro-batch, sample by sample along axis 0, and the samples'
    `ids`, int64 [n]. Rows past the n-th are padding, which no loss or count ever sees."""

    input: Any
    target: Any
    ids: torch.Tensor


def load_micro_batch(samples: Sequence[Any], ids: list[int], size: int | None = None) -> MicroBatch:
    """The tensors of `ids`, padded to `size` rows (None: to one row where there is no sample, since
    layers need not take an empty batch) with copies of the set's first sample."""
    rows = [samples[i] for i in ids]
    missing = (size if size is not None else max(1, len(ids))) - len(ids)
    rows += [samples[0]] * missing
    inputs, targets = default_collate(rows)
    return MicroBatch(inputs, targets, torch.tensor(ids, dtype=torch.int64))
