"""This module hashes sample ids, so that ranks can prove which samples they saw."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from ..data.permutation import FIRST, GOLDEN, SECOND

_U = numpy.uint64


def hash_ids(ids: torch.Tensor, salt: torch.Tensor | None = None) -> int:
    """Sum a hash of each id, or of each (id, salt), modulo 2**64.

    The sum is the same for any order and any split of `ids` (int64 [n]). The hash is splitmix64
    (Steele, Lea and Flood 2014)."""
    return int(numpy.add.reduce(_hashes(ids, salt)))


def hash_each(parts: Sequence[torch.Tensor]) -> list[int]:
    """Return `hash_ids` of each part (int64 [n]); several small ones take as long as one."""
    ends = [0, *itertools.accumulate(part.shape[0] for part in parts)]
    sums = numpy.zeros(1 + ends[-1], numpy.uint64)
    numpy.cumsum(_hashes(torch.cat(list(parts))), out=sums[1:])
    found: list[int] = numpy.diff(sums[ends]).tolist()
    return found


def _hashes(ids: torch.Tensor, salt: torch.Tensor | None = None) -> Any:
    z = ids.cpu().numpy().astype(numpy.uint64)
    z *= _U(GOLDEN)
    if salt is not None:
        z += salt.cpu().numpy().astype(numpy.uint64) * _U(0xD1B54A32D192ED03)
    z += _U(1)
    for shift, factor in ((_U(30), _U(FIRST)), (_U(27), _U(SECOND))):
        z ^= z >> shift
        z *= factor
    z ^= z >> _U(31)
    return z
