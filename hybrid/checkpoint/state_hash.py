"""Takes the hash of a whole training state, which does not depend on how the state is cut.

It is the SHA-256 over canonical tensors, sorted by name and, of one name, the weight first and then
the other keys sorted. Each adds its name, NUL, its key, NUL, its dtype as safetensors writes it,
NUL, its shape as compact JSON, NUL, and the little-endian bytes of the whole tensor."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..launch.exchange import gather_objects, group_device
from ..launch.serialization import sendable
from .manifest import Entry, Manifest, compact, rows_of
from .pieces import Piece, Share, order_of, shares_of
from .tensor_file import BUFFER_BYTES, TensorFile, dtype_name, dtype_of, raw_bytes


@sendable
class _Range(NamedTuple):
    """Says that a rank writes `size` elements of a tensor, from `start` on."""

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def hash_entries(
    entries: Mapping[tuple[str, str], Entry],
    blocks: Callable[[str, str, Entry], Iterable[memoryview]],
) -> str:
    """Return the hash of canonical tensors; `blocks` returns the bytes of one, in order."""
    digest = hashlib.sha256()
    for (name, key), entry in sorted(entries.items(), key=lambda item: order_of(*item[0])):
        digest.update(_head(name, key, entry.dtype, entry.shape))
        for block in blocks(name, key, entry):
            digest.update(block)
    return digest.hexdigest()


def _head(name: str, key: str, dtype: str, shape: Sequence[int]) -> bytes:
    return "\0".join((name, key, dtype, compact(list(shape)), "")).encode()


class PassingHash:
    """Takes the hash of a state that one process holds whole, while its blocks go past.

    keys: of the shares, in their order. A second pass over all bytes would take as long again as
    writing them."""

    def __init__(self, keys: Sequence[str], shares: Sequence[Share]) -> None:
        self._pieces = {key: share.piece for key, share in zip(keys, shares, strict=True)}
        self._digest, self._entry = hashlib.sha256(), ("", "")

    def take(self, key: str, block: memoryview) -> None:
        """Add a block of the tensor that the file has under this key."""
        piece = self._pieces.get(key)
        if piece is None:
            return  # it does not belong to the state
        if piece.entry != self._entry:
            self._entry = piece.entry
            self._digest.update(_head(*piece.entry, dtype_name(piece.tensor.dtype), piece.shape))
        self._digest.update(block)

    def hexdigest(self) -> str:
        """Return the hash of what has gone past."""
        return self._digest.hexdigest()


def hash_of_files(folder: Path, manifest: Manifest) -> str:
    """Return the hash of the state that a checkpoint's files hold."""
    files = {name: TensorFile(folder / name) for name in manifest.values["files"]}
    room = torch.empty(BUFFER_BYTES, dtype=torch.uint8)  # new memory takes as long as reading
    try:
        return hash_entries(
            manifest.entries, lambda name, key, entry: _from_files(entry, files, room)
        )
    finally:
        for file in files.values():
            file.close()


def ranges_of(entry: Entry) -> list[tuple[int, int, str, str, int]]:
    """Return the contiguous ranges of a tensor in order.

    A range is the start in the tensor, the number of elements, the file, the key there, and the
    start under that key."""
    found = [
        (start, count, piece.file, piece.key, first)
        for piece in entry.pieces
        for start, first, count in rows_of(piece, entry.shape)
    ]
    return sorted(found)


def _from_files(
    entry: Entry, files: Mapping[str, TensorFile], room: torch.Tensor
) -> Iterator[memoryview]:
    """Yield a tensor's bytes, read into `room`: each block is gone when the next one comes."""
    dtype = dtype_of(entry.dtype)
    step = BUFFER_BYTES // dtype.itemsize
    for _, count, file, key, first in ranges_of(entry):
        for begin in range(0, count, step):
            size = min(step, count - begin)
            values = room[: size * dtype.itemsize].view(dtype)
            files[file].read_into(values, key, first + begin)
            yield raw_bytes(values)


def hash_of_pieces(pieces: Sequence[Piece]) -> str:
    """Return the hash of the live state, on every rank; collective.

    Rank 0 takes it, to which the others send what they hold, a buffer at a time."""
    shares = shares_of(pieces)
    mine = [_range_of(share) for share in shares]
    everyone = gather_objects(mine)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank != 0:
        for share in sorted(shares, key=_canonical):
            for block in _blocks(share):
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
                yield from map(raw_bytes, _blocks(own[(name, key), start]))
            else:
                yield from _received(owner, count * dtype_of(entry.dtype).itemsize, entry.dtype)

    found = hash_entries(entries, blocks)
    return str(gather_objects(found)[0])


def _range_of(share: Share) -> _Range:
    piece = share.piece
    dtype = dtype_name(piece.tensor.dtype)
    return _Range(piece.name, piece.key, dtype, piece.shape, share.start, share.count)


def _canonical(share: Share) -> tuple[str, bool, str, int]:
    return (*order_of(*share.piece.entry), share.start)


def _blocks(share: Share) -> Iterator[torch.Tensor]:
    step = max(1, BUFFER_BYTES // share.piece.tensor.dtype.itemsize)
    for first in range(0, share.count, step):
        yield share.read(first, min(step, share.count - first))


def _as_bytes(block: torch.Tensor) -> torch.Tensor:
    return block.contiguous().view(torch.uint8)


def _received(owner: int, size: int, dtype: str) -> Iterator[memoryview]:
    width = dtype_of(dtype).itemsize
    step = max(1, BUFFER_BYTES // width) * width
    for first in range(0, size, step):
        block = torch.empty(min(step, size - first), dtype=torch.uint8, device=group_device())
        dist.recv(block, owner)
        yield raw_bytes(block)
