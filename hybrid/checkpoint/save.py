"""Saves a checkpoint: every rank its own pieces, rank 0 the manifest, and then the name.

The order is what makes it safe. A new folder gets a temporary name; every rank writes and flushes
its file there; rank 0 writes the manifest, flushes it and the folder, and gives the folder its
name. Whatever ends a process on the way leaves older checkpoints as they were."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..job.errors import NoRoom, RunError, needs_room
from .folders import PART, folder_of
from .manifest import FORMAT, MANIFEST, Entry, FilePiece, Manifest, rank_file, seal
from .pieces import Share
from .state_hash import hash_of_files
from .tensor_file import Flusher, Part, dtype_name, write_file

Gather = Callable[[Any], list[Any]]  # returns every rank's value
Problem = tuple[bool, str] | None  # whether it is a lack of room, and its words


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

    def copy(self) -> "Snapshot":
        """Return a snapshot of copies on the CPU, which training does not change any more."""
        shares = []
        for share in self.shares:
            part = share.read(0, share.count).to("cpu", copy=True)
            piece = dataclasses.replace(share.piece, tensor=part, start=share.start)
            shares.append(Share(piece, 0, share.count))
        own = {name: tensor.to("cpu", copy=True) for name, tensor in self.own.items()}
        return dataclasses.replace(self, shares=shares, own=own)


@dataclasses.dataclass(frozen=True)
class _Written:
    """Says what a rank has written, or why it could not."""

    file: Mapping[str, Any]
    entries: Sequence[tuple[str, str, str, tuple[int, ...], FilePiece]]
    own: Mapping[str, Any]
    numbers: Mapping[str, Any]
    problem: "Problem" = None


def save(checkpoints: Path, snapshot: Snapshot, rank: int, gather: Gather) -> str:
    """Save a checkpoint into a new folder of `checkpoints`, and return the hash of its state.

    Every rank calls it; `gather` is collective. Raises NoRoom or RunError on every rank if one of
    them could not write, and leaves nothing then."""
    folder = folder_of(checkpoints, snapshot.step)
    part = folder.with_name(folder.name + PART)
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
    problem = _caught(lambda: part.mkdir(parents=True), part) if rank == 0 else None
    _require(gather(problem), part, rank)
    written = _write(part, snapshot, rank)
    everyone: list[_Written] = gather(written)
    _require([one.problem for one in everyone], part, rank)
    state_hash, problem = "", None
    if rank == 0:
        found: list[str] = []
        problem = _caught(lambda: found.append(_commit(part, folder, snapshot, everyone)), part)
        state_hash = found[0] if found else ""
    answers = gather((state_hash, problem))
    _require([answer[1] for answer in answers], part, rank)
    return str(answers[0][0])


def _write(part: Path, snapshot: Snapshot, rank: int) -> _Written:
    name = rank_file(rank)
    parts, entries = [], []
    for share in snapshot.shares:
        piece = share.piece
        key = f"{piece.key}/{piece.name}@{share.start}"
        place = FilePiece(name, key, share.start, share.count)
        entries.append((piece.name, piece.key, dtype_name(piece.tensor.dtype), piece.shape, place))
        parts.append(Part(key, piece.tensor.dtype, share.count, share.read))
    own: dict[str, Any] = {}
    for label, tensor in snapshot.own.items():
        flat = tensor.detach().reshape(-1)
        key = f"own/{label}"
        parts.append(Part(key, flat.dtype, len(flat), functools.partial(_slice, flat)))
        own[label] = {"key": key, "dtype": dtype_name(flat.dtype), "shape": list(tensor.shape)}
    file: dict[str, Any] = {}
    flushers: list[Flusher] = []

    def write() -> None:
        about, flusher = write_file(part / name, parts)
        file.update(about)
        flushers.append(flusher)

    problem = _caught(write, part)
    for flusher in flushers:
        problem = problem or _caught(flusher.finish, part)
    return _Written(file, entries, own, dict(snapshot.numbers), problem)


def _slice(flat: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return flat[first : first + count]


def _commit(part: Path, folder: Path, snapshot: Snapshot, everyone: Sequence[_Written]) -> str:
    """Write the manifest and give the folder its name; return the hash of the state."""
    tensors: dict[tuple[str, str], Entry] = {}
    for one in everyone:
        for name, key, dtype, shape, place in one.entries:
            entry = tensors.setdefault((name, key), Entry(dtype, shape, []))
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise RunError(f"{name} {key}: ranks hold it as {entry[:2]} and {(dtype, shape)}")
            entry.pieces.append(place)  # type: ignore[attr-defined]
    files = {rank_file(rank): dict(one.file) for rank, one in enumerate(everyone)}
    own = [{"numbers": dict(one.numbers), "tensors": dict(one.own)} for one in everyone]
    values = {"format": FORMAT, "step": snapshot.step, **snapshot.values, "files": files}
    values |= {"ranks": own, "tensors": _as_json(tensors)}
    state_hash = hash_of_files(part, Manifest(values, tensors))
    values["state_hash"] = state_hash
    _write_flushed(part / MANIFEST, seal(values))
    _flush(part)
    if folder.exists():  # of an earlier run of these steps
        old = folder.with_name(f"{folder.name}.old{PART}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(part, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(part, folder)
    _flush(folder.parent)
    return state_hash


def _as_json(tensors: Mapping[tuple[str, str], Entry]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (name, key), entry in tensors.items():
        pieces = sorted(entry.pieces, key=lambda place: place.start)
        places = [{"file": p.file, "key": p.key, "flat": [p.start, p.size]} for p in pieces]
        value = {"dtype": entry.dtype, "shape": list(entry.shape), "pieces": places}
        found.setdefault(name, {})[key] = value
    return found


def _write_flushed(path: Path, text: str) -> None:
    with path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Flush a folder's list of names to the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _caught(write: Callable[[], Any], folder: Path) -> Problem:
    """Do something, and return what went wrong: other ranks wait to hear of it."""
    try:
        with needs_room(folder):
            write()
    except Exception as error:
        return isinstance(error, NoRoom), str(error) or type(error).__name__
    return None


def _require(problems: Sequence[Problem], part: Path, rank: int) -> None:
    """Raise the first rank's problem on every rank, and remove what was written."""
    for number, problem in enumerate(problems):
        if problem is not None:
            if rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            is_room, words = problem
            if is_room:
                raise NoRoom(words)
            raise RunError(f"rank {number} could not save a checkpoint: {words}")
