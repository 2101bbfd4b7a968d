"""This module tells from a set itself how many targets its samples have, before any is loaded."""

import math
from typing import Any

from torch.utils.data import Subset, TensorDataset

from .samples import reader_of

IGNORED_TARGET = -100  # losses leave such targets out (torch's own default)
ROWS = 2**16  # targets are looked through in pieces, so that this needs little memory


def targets_per_sample(samples: Any) -> int | None:
    """Returns how many targets each sample has that a loss counts; None where that is not known.

    A set may say so itself, by an int attribute of this name. A `TensorDataset` of two tensors
    whose second holds integers is looked through once: each counts unless one of them is -100. A
    loss alone knows what it counts of floating targets."""
    declared = getattr(samples, "targets_per_sample", None)
    if type(declared) is int:
        return declared
    if reader_of(samples) is Subset:
        return targets_per_sample(samples.dataset)
    if reader_of(samples) is not TensorDataset or len(samples.tensors) != 2:
        return None
    target = samples.tensors[1]
    if target.is_floating_point() or target.is_complex():
        return None
    if any(bool((rows == IGNORED_TARGET).any()) for rows in target.split(ROWS)):
        return None
    return math.prod(target.shape[1:])
