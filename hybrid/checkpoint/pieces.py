"""This module defines what a checkpoint holds of a live run: pieces of canonical tensors.

A canonical tensor is a whole parameter, buffer or tensor of the optimizer's state, by the name that
the model gives it, whichever way a strategy cuts it. A rank shows its parts of them as pieces, and
the checkpoint reads and writes these in place: no rank ever holds a whole tensor for it."""

import dataclasses
import zlib
from collections.abc import Iterable, Iterator

import torch

from .manifest import WEIGHT as WEIGHT
from .manifest import order_of
from .tensor_file import BUFFER_BYTES

SHARED_FROM = 2**14  # elements from which several ranks write a tensor that each of them has
WRITTEN_ELSEWHERE = (-1, 1)  # `copies` of a part that this rank loads, and that others write


@dataclasses.dataclass(frozen=True)
class Piece:
    """Is one rank's live part of one canonical tensor: `tensor` is read and written in place.

    shape: of the whole tensor. start: where the part begins in it, flattened; the part is
    contiguous there. copies: this rank's place among the ranks that hold the same part, and how
    many these are; together they write it once."""

    name: str
    key: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    start: int = 0
    copies: tuple[int, int] = (0, 1)

    @property
    def entry(self) -> tuple[str, str]:
        """Return the name and the key, which name a canonical tensor together."""
        return self.name, self.key

    def read(self, first: int, count: int) -> torch.Tensor:
        """Return elements of the part as a 1-D tensor on its device, not copied where it can be."""
        return self.tensor.detach().reshape(-1)[first : first + count]

    @torch.no_grad()
    def write(self, first: int, values: torch.Tensor) -> None:
        """Put a 1-D tensor's values into the part, from element `first` of it on."""
        live = self.tensor.detach()
        if live.is_contiguous():
            live.view(-1)[first : first + len(values)].copy_(values)
            return
        flat = live.reshape(-1)
        flat[first : first + len(values)].copy_(values)
        live.copy_(flat.view(live.shape))


@dataclasses.dataclass(frozen=True)
class Share:
    """Is what one rank writes of a piece: `count` elements from `first` on, counted in the piece.

    A replicated tensor is shared out over the ranks that hold it."""

    piece: Piece
    first: int
    count: int

    @property
    def start(self) -> int:
        """Return where the share begins in the whole tensor, flattened."""
        return self.piece.start + self.first

    def read(self, first: int, count: int) -> torch.Tensor:
        """Return elements of the share as a 1-D tensor; `first` counts in the share."""
        return self.piece.read(self.first + first, count)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the share as 1-D tensors of at most a buffer each; an empty share has none."""
        step = max(1, BUFFER_BYTES // self.piece.tensor.dtype.itemsize)
        for first in range(0, self.count, step):
            yield self.read(first, min(step, self.count - first))


def shares_of(pieces: Iterable[Piece]) -> list[Share]:
    """Return what this rank writes of its pieces, in canonical order.

    A small tensor is written whole by one of the ranks that hold it, which take turns by its name:
    that is all that these ranks surely have in common. An empty piece is not written."""
    found = []
    for piece in sorted(pieces, key=lambda piece: (*order_of(*piece.entry), piece.start)):
        (mine, ranks), size = piece.copies, piece.tensor.numel()
        if mine < 0:
            continue
        if size < SHARED_FROM or ranks == 1:
            turn = zlib.crc32("\0".join(piece.entry).encode()) % ranks
            if turn == mine and (size or 0 in piece.shape):
                found.append(Share(piece, 0, size))
            continue
        first, end = size * mine // ranks, size * (mine + 1) // ranks
        found.append(Share(piece, first, end - first))
    return found
