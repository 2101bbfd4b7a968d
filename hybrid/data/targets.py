"""This module tells from a set itself how many targets its samples have, before any is loaded."""

import math
from typing import Any

from torch.utils.data import Subset, TensorDataset

from .samples import JobSet, reader_of

IGNORED_TARGET = -100  # torch's losses leave such targets out by default
ROWS = 2**16  # targets are looked through in pieces, so that this needs little memory


def targets_per_sample(samples: Any, loss: Any) -> int | None:
    """Returns how many targets each sample has that a loss counts; None where that is not known.

    It is where the loss has an attribute `ignored`: each integer target but that one counts one.
    Another loss, such as one with class weights, is asked instead. A set may tell the number
    itself, by an int attribute of this name, which is of a loss that leaves out -100. A
    `TensorDataset` of two tensors whose second holds integers is looked through once."""
    ignored = getattr(loss, "ignored", None)
    if type(ignored) is not int:
        return None
    declared = getattr(samples, "targets_per_sample", None)
    if type(declared) is int and ignored == IGNORED_TARGET:
        return declared
    if reader_of(samples) is Subset:
        return targets_per_sample(samples.dataset, loss)
    if isinstance(samples, JobSet):  # a collate function may change what the set does not tell
        return targets_per_sample(samples.samples, loss) if samples.collate is None else None
    if reader_of(samples) is not TensorDataset or len(samples.tensors) != 2:
        return None
    target = samples.tensors[1]
    if target.is_floating_point() or target.is_complex():
        return None
    if any(bool((rows == ignored).any()) for rows in target.split(ROWS)):
        return None
    return math.prod(target.shape[1:])
