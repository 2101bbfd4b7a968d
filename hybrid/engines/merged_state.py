"""This module shows replicas that differ as one state: the one that a merge at this moment gives.

Local SGD's replicas differ between merges, and their optimizers' state always does. A checkpoint
has their mean as its canonical tensors, from which any strategy goes on. Each replica's own tensors
stand beside it, from which the same run goes on."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from ..checkpoint.pieces import Piece, Share, shares_of
from ..job.errors import JobError, RunError
from ..launch.exchange import gather_objects, group_device

_LABEL = "replica"
BLOCK = 2**20  # elements whose mean is taken at once, in float64
Entry = tuple[str, str]
Kinds = dict[Entry, tuple[torch.dtype, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class CopiedPiece(Piece):
    """Is a tensor that all replicas of a process take over alike."""

    replicas: Sequence[Piece] = ()

    def write(self, first: int, values: torch.Tensor) -> None:
        for piece in self.replicas:
            piece.write(first, values)


def copied_pieces(replicas: Sequence[Sequence[Piece]]) -> list[Piece]:
    """Return pieces that write to all replicas of this process."""
    found: list[Piece] = []
    for pieces in zip(*replicas, strict=True):
        one = pieces[0]
        found.append(CopiedPiece(one.name, one.key, one.shape, one.tensor, 0, one.copies, pieces))
    return found


def merged_pieces(
    replicas: Sequence[Sequence[Piece]], weights: Sequence[float], rank: int, ranks: int
) -> list[Piece]:
    """Return this rank's shares of the mean of all replicas, those of other ranks too; collective.

    weights: of this process's replicas; all ranks' add up to 1. Numbers that are no floating-point
    ones, and `step`, are the first replica's. What a replica has not is zero there. A block at a
    time is made, so that no rank holds more than its shares of the mean and one block."""
    held = [{piece.entry: piece for piece in pieces} for pieces in replicas]
    mean = _Mean(held, weights, rank)
    found = []
    kinds = _kinds_of(held)
    for owner in range(ranks):
        for share in _shares(kinds, owner, ranks):
            entry, dtype = share.piece.entry, share.piece.tensor.dtype
            part = torch.empty(share.count if owner == rank else 0, dtype=dtype)
            for first in range(0, share.count, BLOCK):
                count = min(BLOCK, share.count - first)
                block = mean.block(entry, kinds[entry], share.first + first, count, owner)
                if owner == rank:
                    part[first : first + count] = block
            if owner == rank:
                found.append(Piece(*entry, share.piece.shape, part, share.start))
    return found


def _kinds_of(held: Sequence[Mapping[Entry, Piece]]) -> Kinds:
    """Return the dtype and the shape of every tensor that any replica of any rank has."""
    mine = {e: (p.tensor.dtype, p.shape) for pieces in held for e, p in pieces.items()}
    found: Kinds = {}
    for kinds in gather_objects(mine):
        for entry, kind in kinds.items():
            if found.setdefault(entry, kind) != kind:
                name, key = entry
                raise RunError(f"{name} {key}: replicas hold it as {found[entry]} and {kind}")
    return found


def _shares(kinds: Kinds, owner: int, ranks: int) -> list[Share]:
    pieces = [
        Piece(*entry, shape, torch.empty(shape, dtype=dtype, device="meta"), 0, (owner, ranks))
        for entry, (dtype, shape) in sorted(kinds.items(), key=lambda kind: kind[0])
    ]
    return shares_of(pieces)


@dataclasses.dataclass(frozen=True)
class _Mean:
    """Takes the weighted mean of replicas, a block at a time."""

    held: Sequence[Mapping[Entry, Piece]]
    weights: Sequence[float]
    rank: int

    @torch.no_grad()
    def block(
        self,
        entry: Entry,
        kind: tuple[torch.dtype, tuple[int, ...]],
        first: int,
        count: int,
        to: int,
    ) -> torch.Tensor:
        """Return elements of the mean, on rank `to`; other ranks' result means nothing.

        Where all replicas have equal bits these are the mean's, unlike those of a sum divided by
        its terms: it is the first replica plus the mean distance from it."""
        mine = [self._read(pieces.get(entry), kind[0], first, count) for pieces in self.held]
        base = mine[0].clone()
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several:
            dist.broadcast(base.view(torch.uint8), 0)
        if not base.is_floating_point() or entry[1] == "step":
            return base
        away = torch.zeros(count, dtype=torch.float64, device=base.device)
        for values, weight in zip(mine, self.weights, strict=True):
            distance = _distance(values.double(), base.double())
            away += torch.where(distance.isfinite(), distance * weight, distance)
        if several:
            dist.reduce(away, to)
        return torch.where(away == 0, base, (base.double() + away).to(base.dtype))

    @staticmethod
    def _read(piece: Piece | None, dtype: torch.dtype, first: int, count: int) -> torch.Tensor:
        several = dist.is_initialized() and dist.get_world_size() > 1
        device = group_device() if several else torch.device("cpu")
        if piece is None:
            return torch.zeros(count, dtype=dtype, device=device)
        return piece.read(first, count).to(device)


def _distance(values: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return `values - base`, 0 where they are alike or `base` is infinite and `values` is not."""
    alike = (values == base) | (values.isnan() & base.isnan())
    return torch.where(alike | (base.isinf() & values.isfinite()), 0.0, values - base)


def own_tensors(replicas: Sequence[Sequence[Piece]]) -> dict[str, torch.Tensor]:
    """Return all tensors of this process's replicas, each under a label of its own."""
    return {_label(i, piece): piece.tensor for i, pieces in enumerate(replicas) for piece in pieces}


def put_own_tensors(
    replicas: Sequence[Sequence[Piece]], tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[int, Piece]]:
    """Take over what `own_tensors` returned; yield the pieces, by replica, that it had not.

    Raises JobError where something is left over."""
    left = {label for label in tensors if label.startswith(_LABEL)}
    for i, pieces in enumerate(replicas):
        for piece in pieces:
            label = _label(i, piece)
            if label in tensors:
                piece.write(0, tensors[label].reshape(-1))
                left.remove(label)
            else:
                yield i, piece
    if left:
        raise JobError(f"the checkpoint has {min(left)} of a replica, which this run has not")


def _label(replica: int, piece: Piece) -> str:
    return f"{_LABEL}{replica}/{piece.key}/{piece.name}"
