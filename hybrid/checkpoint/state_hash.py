"""Takes the hash of a training state that processes hold; it does not depend on how it is cut.

`hybrid.checkpoint.file_hash` says what it is taken of."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..launch.exchange import gather_objects, group_device
from ..launch.serialization import sendable
from .file_hash import hash_entries
from .manifest import Entry, order_of
from .pieces import Piece, Share, shares_of
from .tensor_file import BUFFER_BYTES, WIDTHS
from .tensors import dtype_name, raw_bytes


@sendable
class _Range(NamedTuple):
    """Says that a rank writes `size` elements of a tensor, from `start` on."""

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def hash_of_pieces(pieces: Sequence[Piece]) -> str:
    """Return the hash of the live state, on every rank; collective.

    Rank 0 takes it, to which the others send what they hold, a buffer at a time."""
    shares = shares_of(pieces)
    mine = [_range_of(share) for share in shares]
    everyone = gather_objects(mine)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank != 0:
        for share in sorted(shares, key=_canonical):
            for block in share.blocks():
                dist.send(_as_bytes(block).to(group_device()), 0)
        return str(gather_objects(None)[0])
    held: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    entries: dict[tuple[str, str], Entry] = {}
    own = {(share.piece.entry, share.start): share for share in shares}
    for owner, ranges in enumerate(everyone):
        for r in ranges:
            entries[r.name, r.key] = Entry(r.dtype, r.shape, ())
            held.setdefault((r.name, r.key), []).append((r.start, r.size, owner))

    def blocks(name: str, key: str, entry: Entry) -> Iterator[memoryview]:
        for start, count, owner in sorted(held[name, key]):
            if owner == 0:
                yield from map(raw_bytes, own[(name, key), start].blocks())
            else:
                yield from _received(owner, count * WIDTHS[entry.dtype], entry.dtype)

    found = hash_entries(entries, blocks)
    return str(gather_objects(found)[0])


def _range_of(share: Share) -> _Range:
    piece = share.piece
    dtype = dtype_name(piece.tensor.dtype)
    return _Range(piece.name, piece.key, dtype, piece.shape, share.start, share.count)


def _canonical(share: Share) -> tuple[str, bool, str, int]:
    return (*order_of(*share.piece.entry), share.start)


def _as_bytes(block: torch.Tensor) -> torch.Tensor:
    return block.contiguous().view(torch.uint8)


def _received(owner: int, size: int, dtype: str) -> Iterator[memoryview]:
    width = WIDTHS[dtype]
    step = max(1, BUFFER_BYTES // width) * width
    for first in range(0, size, step):
        block = torch.empty(min(step, size - first), dtype=torch.uint8, device=group_device())
        dist.recv(block, owner)
        yield raw_bytes(block)
