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


class Samples:
    """Holds samples by their ids, and the hash of them once somebody asks."""

    def __init__(self, ids: Sequence[torch.Tensor] = ()) -> None:
        self.unhashed = list(ids)
        self._digest = 0  # of the others

    def digest(self) -> int:
        """Return the hash of all."""
        if self.unhashed:
            hash_together([self])
        return self._digest


def hash_together(several: Sequence[Samples]) -> None:
    """Hash what several hold, for little more than the time of one."""
    parts = [(samples, ids) for samples in several for ids in samples.unhashed]
    if parts:
        for (samples, _), digest in zip(parts, hash_each([ids for _, ids in parts]), strict=True):
            samples._digest = (samples._digest + digest) % 2**64
    for samples in several:
        samples.unhashed = []


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
