"""Reads files of tensors in the safetensors format, a range of bytes at a time. No torch here.

`hybrid.checkpoint.tensors` writes such files, and makes tensors of what they hold. Format:
https://github.com/huggingface/safetensors#format."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..job.reading import unique
from .past_cache import read_past_cache

BUFFER_BYTES = 2**24
LONGEST_HEADER = 10**8  # bytes, as in the library
# The dtypes that are read and written: torch's name of each, and the bytes of an element.
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U8": ("uint8", 1), "BOOL": ("bool", 1), "U16": ("uint16", 2), "U32": ("uint32", 4),
    "U64": ("uint64", 8), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "C64": ("complex64", 8),
}  # fmt: skip
WIDTHS = {name: width for name, (_, width) in DTYPES.items()}


class Damaged(ValueError):
    """Says in one line what is wrong with a file; the line begins with the file's name."""


class Span(NamedTuple):
    """Tells where a tensor stands in a file: its dtype there, its elements, its first byte."""

    dtype: str
    size: int
    begin: int
    shape: tuple[int, ...]


class TensorFile:
    """Reads ranges of a file's flattened tensors; raises Damaged where it is no such file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():  # to open a pipe would wait for ever
            raise Damaged(f"{path.name}: is no regular file")
        self._file = path.open("rb")
        try:
            self.spans = self._read_header()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._file.close()
            raise Damaged(f"{path.name}: is no safetensors file: {error}") from None

    def _read_header(self) -> dict[str, Span]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError("its header is cut off")
        header = json.loads(self._file.read(length), object_pairs_hook=unique)
        header.pop("__metadata__", None)
        spans = {}
        for key, value in header.items():
            dtype, (begin, end) = value["dtype"], value["data_offsets"]
            shape = tuple(value["shape"])
            if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
                raise ValueError(f"{key!r} has a place or a shape that is no list of numbers")
            count = math.prod(shape)
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"{key!r} lies outside the file")
            if end - begin != count * WIDTHS[dtype]:
                raise ValueError(f"{key!r} has another size than its shape")
            spans[key] = Span(dtype, count, 8 + length + begin, shape)
        return spans

    def read_into(self, buffer: Any, key: str, first: int) -> None:
        """Fill a buffer of bytes with a tensor's, from its element `first` on."""
        if len(buffer):
            span = self.spans[key]
            self._file.seek(span.begin + first * WIDTHS[span.dtype])
            if self._file.readinto(buffer) != len(buffer):
                raise Damaged(f"{self.path.name}: ends before its tensors do")

    def blocks(self, key: str, first: int, count: int, room: memoryview) -> Iterator[memoryview]:
        """Yield the bytes of `count` elements, read into `room`: each block is gone at the next."""
        width = WIDTHS[self.spans[key].dtype]
        step = len(room) // width
        for begin in range(0, count, step):
            block = room[: min(step, count - begin) * width]
            self.read_into(block, key, first + begin)
            yield block

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def sha256_of(path: Path, again: bool = False) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    again: the file is read again soon, so it stays in the system's cache of files."""
    with path.open("rb") as file:
        if again:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for block in read_past_cache(file):
            digest.update(block)
        return digest.hexdigest()
