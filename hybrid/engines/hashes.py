"""This module hashes sample ids, so that ranks can prove which samples they saw."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from ..data.permutation import FIRST, GOLDEN, SECOND

SALT = 0xD1B54A32D192ED03
_GOLDEN, _FIRST, _SECOND, _SALT, _ONE = map(numpy.uint64, (GOLDEN, FIRST, SECOND, SALT, 1))
_SHIFTS = [numpy.uint64(bits) for bits in (30, 27, 31)]


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
    sizes = [part.shape[0] for part in parts]
    ends = zip(itertools.accumulate(sizes), sizes, strict=True)
    starts = [end - size for end, size in ends if size]  # `reduceat` takes no empty part for one
    if not starts:
        return [0] * len(sizes)
    sums = iter(numpy.add.reduceat(_hashes(torch.cat(list(parts))), starts).tolist())
    return [next(sums) if size else 0 for size in sizes]


def _hashes(ids: torch.Tensor, salt: torch.Tensor | None = None) -> Any:
    z = _unsigned(ids) * _GOLDEN
    if salt is not None:
        z += _unsigned(salt) * _SALT
    z += _ONE
    z ^= z >> _SHIFTS[0]
    z *= _FIRST
    z ^= z >> _SHIFTS[1]
    z *= _SECOND
    z ^= z >> _SHIFTS[2]
    return z


def _unsigned(numbers: torch.Tensor) -> Any:
    """Return int64 numbers modulo 2**64."""
    return numbers.cpu().numpy().view(numpy.uint64)
