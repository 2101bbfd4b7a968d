"""Writes 1-D tensors as files in the safetensors format, a buffer at a time, and reads them back.

The safetensors library keeps all tensors of a file in memory when it writes them, which would
double what a rank holds."""

import contextlib
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from .flushing import Flusher
from .past_cache import PastCache
from .tensor_file import BUFFER_BYTES, DTYPES, TensorFile

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own) for name, (own, _) in DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as safetensors writes it; raises ValueError where the format has no such."""
    if dtype not in _NAMES:
        raise ValueError(f"{dtype}: is no dtype that safetensors can hold")
    return _NAMES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that safetensors writes so; raises KeyError if there is none."""
    return _DTYPES[name]


def raw_bytes(tensor: torch.Tensor) -> Any:
    """Return the little-endian bytes of a 1-D tensor."""
    flat = tensor.detach().cpu().contiguous().view(torch.uint8)
    return flat.numpy().data


class Part(NamedTuple):
    """Is one tensor to be written: `read(first, count)` returns elements of it, 1-D."""

    key: str
    dtype: torch.dtype
    size: int  # in elements
    read: Callable[[int, int], torch.Tensor]
    shape: tuple[int, ...] | None = None  # None: it stands in the file as 1-D


def part_of_tensor(key: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> Part:
    """Return a part that is a whole tensor, which stands under `key` in the file."""
    flat = tensor.detach().reshape(-1)
    return Part(key, flat.dtype, len(flat), lambda first, n: flat[first : first + n], shape)


def parts_of(tensors: Mapping[str, torch.Tensor]) -> list[Part]:
    """Return parts that are whole tensors, which stand by their names in the file, in shape."""
    return [part_of_tensor(name, t, tuple(t.shape)) for name, t in tensors.items()]


def write_file(
    path: Path,
    parts: Sequence[Part],
    metadata: Mapping[str, str] | None = None,
    past_cache: bool = False,
) -> tuple[dict[str, Any], Flusher]:
    """Write a new file of tensors; return its `bytes` and `sha256`, and what flushes it.

    past_cache: nobody reads the file soon. It is on the disk once `finish` of the flusher has
    returned."""
    blocks, digest, size = blocks_of(parts, metadata), hashlib.sha256(), 0
    file = path.open("xb", buffering=0)
    flusher, past = Flusher(file), PastCache(file) if past_cache else None
    try:
        with ThreadPoolExecutor(1, initializer=_yield_cores) as thread:  # which takes the hash
            before: Future[None] | None = None
            for block in blocks:
                beside = thread.submit(digest.update, block)
                _write_all(past or file, block)
                if before:
                    before.result()  # so that no third block takes memory
                before = beside
                size += len(block)
        if past:
            past.end()
    except BaseException:
        with contextlib.suppress(OSError):
            flusher.finish()
        raise
    flusher.end()
    return {"bytes": size, "sha256": digest.hexdigest()}, flusher


def blocks_of(parts: Sequence[Part], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Return the bytes of a file in order, in blocks.

    Raises ValueError at once where the format has no such dtype."""
    text = _header(parts, metadata)
    return itertools.chain((len(text).to_bytes(8, "little"), text), _blocks_of(parts))


def _header(parts: Sequence[Part], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for part in parts:
        begin, end = end, end + part.size * part.dtype.itemsize
        name = dtype_name(part.dtype)
        shape = [part.size] if part.shape is None else list(part.shape)
        header[part.key] = {"dtype": name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text.ljust(-(-len(text) // 8) * 8)


def _yield_cores() -> None:
    """Have this thread take the cores that others leave.

    The hash of a file ends with its write anyway; that of the state takes longer than either."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _write_all(file: BinaryIO | PastCache, block: Any) -> None:
    """Write a whole block; a file without a buffer may take a part of it at once."""
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]


def _blocks_of(parts: Sequence[Part]) -> Iterator[Any]:
    for part in parts:
        step = max(1, BUFFER_BYTES // part.dtype.itemsize)
        for first in range(0, max(1, part.size), step):
            yield raw_bytes(part.read(first, min(step, part.size - first)))


def read(file: TensorFile, key: str, first: int, count: int) -> torch.Tensor:
    """Return elements of a flattened tensor that a file holds, 1-D on the CPU."""
    values = torch.empty(count, dtype=dtype_of(file.spans[key].dtype))
    read_into(values, file, key, first)
    return values


def read_into(values: torch.Tensor, file: TensorFile, key: str, first: int) -> None:
    """Fill a contiguous 1-D tensor on the CPU, of the same dtype, with elements from `first` on."""
    file.read_into(values.view(torch.uint8).numpy().data, key, first)
