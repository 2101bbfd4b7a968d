"""Takes the hash of the state that a checkpoint's files hold. No torch here.

It is the SHA-256 over canonical tensors, sorted by name and, of one name, the weight first and then
the other keys sorted. Each adds its name, NUL, its key, NUL, its dtype as safetensors writes it,
NUL, its shape as compact JSON, NUL, and the little-endian bytes of the whole tensor."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .manifest import Entry, Manifest, compact, order_of, rows_of
from .tensor_file import BUFFER_BYTES, TensorFile


def hash_entries(
    entries: Mapping[tuple[str, str], Entry],
    blocks: Callable[[str, str, Entry], Iterable[memoryview]],
) -> str:
    """Return the hash of canonical tensors; `blocks` returns the bytes of one, in order."""
    digest = hashlib.sha256()
    for (name, key), entry in sorted(entries.items(), key=lambda item: order_of(*item[0])):
        digest.update(_head_of(name, key, entry.dtype, entry.shape))
        for block in blocks(name, key, entry):
            digest.update(block)
    return digest.hexdigest()


def _head_of(name: str, key: str, dtype: str, shape: Sequence[int]) -> bytes:
    """Return what the hash takes of a tensor before its bytes."""
    return "\0".join((name, key, dtype, compact(list(shape)), "")).encode()


def hash_of_files(folder: Path, manifest: Manifest) -> str:
    """Return the hash of the state that a checkpoint's files hold."""
    files = {name: TensorFile(folder / name) for name in manifest.values["files"]}
    room = memoryview(bytearray(BUFFER_BYTES))  # new memory takes as long as reading
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
    entry: Entry, files: Mapping[str, TensorFile], room: memoryview
) -> Iterator[memoryview]:
    """Yield a tensor's bytes, read into `room`: each block is gone when the next one comes."""
    for _, count, file, key, first in ranges_of(entry):
        yield from files[file].blocks(key, first, count, room)
