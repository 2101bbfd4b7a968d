"""This module defines what one rank writes of a state: the live tensors, or copies of them."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch

from .pieces import WEIGHT, Share


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Is what one rank writes: its shares of the state, tensors of its own, and its numbers.

    values: of the manifest; rank 0's are taken. own: tensors that belong to this rank alone, such
    as the states of its generators. numbers: what they need beside them, as JSON."""

    step: int
    shares: Sequence[Share]
    own: Mapping[str, torch.Tensor]
    numbers: Mapping[str, Any]
    values: Mapping[str, Any]

    def copy(
        self, into: "Snapshot | None" = None, later: "list[Unfilled] | None" = None
    ) -> "Snapshot":
        """Return a snapshot of copies on the CPU, which training does not change any more.

        into: an earlier copy that nobody needs now, or room; its memory is used again where it
        fits, since new memory takes longer than the copying. later: takes what the optimizer keeps
        on the CPU, which `fill` must copy before the optimizer's next step; left out, nothing waits
        for that."""
        room = {(s.piece.entry, s.start): s.piece.tensor for s in into.shares} if into else {}
        shares = []
        for share in self.shares:
            part = share.read(0, share.count)
            copied = room.get((share.piece.entry, share.start))
            if copied is None or (copied.shape, copied.dtype) != (part.shape, part.dtype):
                copied = torch.empty(part.shape, dtype=part.dtype)
            if later is None or share.piece.key == WEIGHT or part.device.type != "cpu":
                copied.copy_(part)
            else:
                later.append((copied, part))
            piece = dataclasses.replace(share.piece, tensor=copied, start=share.start)
            shares.append(Share(piece, 0, share.count))
        own = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.own.items()}
        numbers, values = copy.deepcopy(self.numbers), copy.deepcopy(self.values)
        return dataclasses.replace(self, shares=shares, own=own, numbers=numbers, values=values)

    def touch(self, enough: Callable[[], bool]) -> None:
        """Fill room with zeros, so that the system gives it its memory now.

        Weights come first, for whose copies training waits. It ends where `enough()` says so."""
        for share in sorted(self.shares, key=lambda share: share.piece.key != WEIGHT):
            for block in share.blocks():
                if enough():
                    return
                block.zero_()


Unfilled = tuple[torch.Tensor, torch.Tensor]  # a copy that is to be made, and what of


def fill(unfilled: Sequence[Unfilled]) -> None:
    """Make the copies that `Snapshot.copy` left for later.

    One core does that: a thread that copies by torch would start as many more as torch has, and
    take the cores of those that train."""
    for copied, live in unfilled:
        numpy.copyto(copied.view(torch.uint8).numpy(), live.view(torch.uint8).numpy())


def make_room(shares: Sequence[Share]) -> Snapshot:
    """Return room for a copy of shares, which has no memory yet: see `Snapshot.touch`."""
    found = []
    for share in shares:
        room = torch.empty(share.count, dtype=share.piece.tensor.dtype)
        piece = dataclasses.replace(share.piece, tensor=room, start=share.start)
        found.append(Share(piece, 0, share.count))
    return Snapshot(0, found, {}, {}, {})
