"""Loads a checkpoint into a live run: each rank reads the ranges that it holds, and no more."""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..job.errors import JobError
from ..launch.exchange import gather_objects
from .file_hash import ranges_of
from .manifest import Entry, Manifest, rank_file
from .pieces import Piece
from .tensor_file import BUFFER_BYTES, TensorFile
from .tensors import dtype_name, dtype_of, read, read_into


def load(folder: Path, manifest: Manifest, pieces: Sequence[Piece]) -> None:
    """Put a checkpoint's values into all ranks' pieces; collective.

    Raises JobError on every rank unless the checkpoint and the run have the same tensors: with
    their names, keys, dtypes and shapes."""
    _require_same(folder, manifest, pieces)
    reader = Reader(folder, manifest)
    room = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
    try:
        for piece in pieces:
            dtype, size = piece.tensor.dtype, piece.tensor.numel()
            step = BUFFER_BYTES // dtype.itemsize
            for first in range(0, size, step):
                values = room[: min(step, size - first) * dtype.itemsize].view(dtype)
                reader.read_into(values, *piece.entry, piece.start + first)
                piece.write(first, values)
    finally:
        reader.close()


class Reader:
    """Reads ranges of canonical tensors from a checkpoint's files, however those are cut."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._files: dict[str, TensorFile] = {}
        self._ranges: dict[tuple[str, str], list[tuple[int, int, str, str, int]]] = {}

    def read(self, name: str, key: str, start: int, count: int) -> torch.Tensor:
        """Return elements of one flattened tensor, 1-D on the CPU."""
        values = torch.empty(count, dtype=dtype_of(self.manifest.entries[name, key].dtype))
        self.read_into(values, name, key, start)
        return values

    def read_into(self, values: torch.Tensor, name: str, key: str, start: int) -> None:
        """Fill a 1-D tensor on the CPU, of the same dtype, with elements from `start` on."""
        if (name, key) not in self._ranges:
            self._ranges[name, key] = ranges_of(self.manifest.entries[name, key])
        ranges, end = self._ranges[name, key], start + len(values)
        i = max(0, bisect.bisect_right(ranges, start, key=lambda r: r[0]) - 1)
        while i < len(ranges) and ranges[i][0] < end:
            begin, size, file, part, first = ranges[i]
            low, high = max(begin, start), min(begin + size, end)
            if low < high:
                into = values[low - start : high - start]
                read_into(into, self._file(file), part, first + low - begin)
            i += 1

    def whole(self, name: str, key: str) -> torch.Tensor:
        """Return a whole tensor on the CPU, in its shape."""
        entry = self.manifest.entries[name, key]
        return self.read(name, key, 0, entry.size).view(entry.shape)

    def own(self, rank: int) -> Mapping[str, torch.Tensor]:
        """Return the tensors that belong to one rank alone, by their labels.

        Each is read when it is asked for: a replica's are as many as its model's and its state's,
        which a rank need not hold twice."""
        return _OwnTensors(self, rank)

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name)
        return self._files[name]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


class _OwnTensors(Mapping[str, torch.Tensor]):
    """Reads the tensors that belong to one rank alone."""

    def __init__(self, reader: Reader, rank: int) -> None:
        self._reader = reader
        self._places: Mapping[str, Any] = reader.manifest.values["ranks"][rank]["tensors"]
        self._name = rank_file(rank)

    def __getitem__(self, label: str) -> torch.Tensor:
        place, file = self._places[label], self._reader._file(self._name)
        count = file.spans[place["key"]].size
        return read(file, place["key"], 0, count).view(place["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _require_same(folder: Path, manifest: Manifest, pieces: Sequence[Piece]) -> None:
    mine = {piece.entry: (dtype_name(piece.tensor.dtype), piece.shape) for piece in pieces}
    wanted: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    for held in gather_objects(mine):
        wanted |= held
    saved = manifest.entries
    for name, key in sorted(wanted.keys() - saved.keys()):
        raise JobError(f"{folder}: has no {key} of {name}, which this run has")
    for name, key in sorted(saved.keys() - wanted.keys()):
        raise JobError(f"{folder}: has the {key} of {name}, which this run has not")
    for (name, key), (dtype, shape) in sorted(wanted.items()):
        entry: Entry = saved[name, key]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise JobError(
                f"{folder}: the {key} of {name} is {entry.dtype} {list(entry.shape)} there and "
                f"{dtype} {list(shape)} in this run"
            )
