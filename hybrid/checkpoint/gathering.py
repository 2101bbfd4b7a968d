"""Sends whole weights to rank 0, a buffer at a time: no other rank ever holds a whole tensor.

Rank 0 holds one buffer of them where it writes them to a file, and all where it is asked to."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..job.errors import RunError
from ..launch.exchange import gather_objects, group_device
from .pieces import WRITTEN_ELSEWHERE, Piece, Share, shares_of
from .tensor_file import BUFFER_BYTES
from .tensors import Part


class _Range(NamedTuple):
    """Says that a rank holds `size` elements of a tensor, from `start` on."""

    start: int
    size: int
    owner: int


class WholeWeights:
    """Shows the tensors that all ranks hold together; collective.

    pieces: of this rank, each with a name of its own. names: those of all ranks, in order. Of what
    several ranks hold, the first of them is asked. On rank 0 `part` and `tensor` read a whole
    tensor while the other ranks `send` it: all must name the same tensors in the same order."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        asked = [_of_first_copy(piece) for piece in pieces]
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._own = {share.piece.name: share for share in shares_of(asked)}
        kinds = [(p.name, p.tensor.dtype, p.shape) for p in asked]
        ranges = [(share.piece.name, share.start, share.count) for share in self._own.values()]
        ranks = gather_objects([kinds, ranges])
        self._kinds = {name: (dtype, shape) for r in ranks for name, dtype, shape in r[0]}
        self._held: dict[str, list[_Range]] = {name: [] for name in self._kinds}
        for owner, (_, found) in enumerate(ranks):
            for name, start, count in found:
                self._held[name].append(_Range(start, count, owner))

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the ranks and of their pieces."""
        return list(self._kinds)

    def send(self, names: Iterable[str]) -> None:
        """Send what this rank holds of these tensors to rank 0, which reads them meanwhile."""
        for name in names:
            share = self._own.get(name)
            if share is None:
                continue
            step = self._step(name)
            for first in range(share.start // step * step, share.start + share.count, step):
                block = _overlap(share, first, step)
                dist.send(block.contiguous().view(torch.uint8).to(group_device()), 0)

    def part(self, key: str, name: str) -> Part:
        """Return a tensor to be written under `key`; it is read in order, a buffer at a time."""
        dtype, shape = self._kinds[name]
        return Part(
            key,
            dtype,
            torch.Size(shape).numel(),
            lambda first, n: self._read(name, first, n),
            shape,
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Return a copy of a whole tensor, on the CPU."""
        dtype, shape = self._kinds[name]
        whole = torch.empty(shape, dtype=dtype)
        flat, step = whole.view(-1), self._step(name)
        for first in range(0, len(flat), step):
            count = min(step, len(flat) - first)
            flat[first : first + count] = self._read(name, first, count)
        return whole

    def _step(self, name: str) -> int:
        """Return how many elements are read at once: those of a block of a file."""
        return max(1, BUFFER_BYTES // self._kinds[name][0].itemsize)

    def _read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Return elements of a tensor, 1-D on the CPU, received from the ranks that hold them."""
        dtype = self._kinds[name][0]
        found = [torch.empty(0, dtype=dtype)]
        for start, size, owner in sorted(self._held[name]):
            common = min(start + size, first + count) - max(start, first)
            if common <= 0:
                continue
            if owner == self.rank:
                block = _overlap(self._own[name], first, count).cpu()
            else:
                raw = torch.empty(common * dtype.itemsize, dtype=torch.uint8, device=group_device())
                dist.recv(raw, owner)
                block = raw.cpu().view(dtype)
            found.append(block)
        if (held := sum(map(len, found))) != count:
            raise RunError(f"{name}: ranks hold {held} of {count} elements from {first} on")
        return found[1] if len(found) == 2 else torch.cat(found)


def _of_first_copy(piece: Piece) -> Piece:
    """Return a piece that the first of those ranks has all of that hold it."""
    mine = piece.copies[0] == 0
    return dataclasses.replace(piece, copies=(0, 1) if mine else WRITTEN_ELSEWHERE)


def _overlap(share: Share, first: int, count: int) -> torch.Tensor:
    """Return what a share has of the elements `first` to `first + count` of the whole tensor."""
    begin, end = max(first, share.start), min(first + count, share.start + share.count)
    return share.read(begin - share.start, end - begin)


def gather_whole(pieces: Iterable[Piece]) -> dict[str, torch.Tensor]:
    """Return copies of whole tensors on rank 0 by name, and nothing elsewhere; collective."""
    weights = WholeWeights(pieces)
    if weights.rank:
        weights.send(weights.names)
        return {}
    return {name: weights.tensor(name) for name in weights.names}
