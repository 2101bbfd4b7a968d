"""Saves a checkpoint: every rank its own pieces, rank 0 the manifest, and then the name.

The order is what makes it safe. A new folder gets a temporary name; every rank writes and flushes
its file there; rank 0 writes the manifest, flushes it and the folder, gives the folder its name and
flushes that; older checkpoints are removed only then. What a process leaves that is ended on the
way has a temporary name, by which the next start knows it (`folders.remove_unfinished`)."""

import contextlib
import copy
import dataclasses
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from ..job.errors import NoRoom, RunError
from ..launch.serialization import sendable
from .file_hash import hash_of_files
from .flushing import Flusher, flush_folder, make_folder, write_flushed
from .folders import PART, folder_of, replaced_name
from .manifest import (
    FORMAT,
    MANIFEST,
    Entry,
    FilePiece,
    Manifest,
    rank_file,
    seal,
    tensors_as_json,
    uncovered,
)
from .pieces import WEIGHT, Share
from .ranks import Gather, Ranks
from .state_hash import PassingHash
from .tensors import Part, dtype_name, part_of_tensor, raw_bytes, write_file

RNG = "rng/"  # how the labels of generators' states begin, among the tensors of one rank
SHARED = "all hosts must share the file system of the run's folder"


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

    def touch(self) -> None:
        """Fill room with zeros, so that the system gives it its memory now."""
        for share in self.shares:
            share.piece.tensor.zero_()


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


@sendable
class StateHashes(NamedTuple):
    """Tells one state from another, by two hashes.

    They are that of the state, and that of what ranks have of their own beside it and their
    generators (empty where they have nothing)."""

    state_hash: str
    own_hash: str = ""


@sendable
@dataclasses.dataclass(frozen=True)
class _Written:
    """Says what a rank has written."""

    file: Mapping[str, Any]
    entries: Sequence[tuple[str, str, str, tuple[int, ...], FilePiece]]
    own: Mapping[str, Any]
    numbers: Mapping[str, Any]
    own_hash: str
    host: str
    state_hash: str  # taken in passing by a rank that is alone, empty: not yet


def save(
    checkpoints: Path,
    snapshot: Snapshot,
    rank: int,
    gather: Gather,
    unlike: StateHashes | None = None,
    tidy: Callable[[], None] = lambda: None,
) -> StateHashes:
    """Save a checkpoint into a new folder of `checkpoints`, and return the hashes of its state.

    Every rank calls it; `gather` is collective. unlike: the state of an earlier checkpoint, which
    the steps since then must have changed. tidy: removes old checkpoints, on rank 0, once this one
    is committed. Raises NoRoom or RunError on every rank if one of them could not do its part; of
    the new checkpoint there is nothing then, unless only `tidy` failed."""
    folder = folder_of(checkpoints, snapshot.step)
    part = folder.with_name(folder.name + PART)
    ranks = Ranks(rank, gather, checkpoints, snapshot.step)
    flushers: list[Flusher] = []  # of this rank's file
    hashed: list[tuple[dict[str, Any], StateHashes]] = []  # the manifest, on rank 0
    try:
        alone = len(ranks.each(lambda: make_folder(part) if rank == 0 else None)) == 1
        everyone = ranks.each(lambda: _write(part, snapshot, rank, flushers, alone))

        def finish() -> None:
            # Rank 0 takes the hash of what all have written while that goes on to the disks.
            if rank == 0:
                hashed.append(_take_hash(part, snapshot, everyone, unlike))
            flushers[0].finish()

        ranks.each(finish)
        saved: StateHashes = ranks.first(lambda: _commit(part, folder, *hashed[0]))
    except (NoRoom, RunError):
        _take_away(part, rank, flushers)
        raise
    ranks.first(tidy)
    return saved


def _take_away(part: Path, rank: int, flushers: Sequence[Flusher]) -> None:
    """Remove what a save that failed has written; all ranks are here, so nobody still writes.

    Hosts that do not share the file system each have a folder of their own."""
    with contextlib.suppress(OSError):
        for flusher in flushers:
            flusher.finish()
    with contextlib.suppress(OSError):
        (part / rank_file(rank)).unlink(missing_ok=True)
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)


def _write(
    part: Path, snapshot: Snapshot, rank: int, flushers: list[Flusher], alone: bool = False
) -> _Written:
    """Write this rank's file; what flushes it to the disk is added to `flushers`."""
    name, host = rank_file(rank), socket.gethostname()
    parts, entries = [], []
    for share in snapshot.shares:
        piece = share.piece
        key = f"{piece.key}/{piece.name}@{share.start}"
        place = FilePiece(name, key, share.start, share.count)
        entries.append((piece.name, piece.key, dtype_name(piece.tensor.dtype), piece.shape, place))
        parts.append(Part(key, piece.tensor.dtype, share.count, share.read))
    own: dict[str, Any] = {}
    digest = hashlib.sha256()
    for label, tensor in sorted(snapshot.own.items()):
        key = f"own/{label}"
        parts.append(part_of_tensor(key, tensor))
        own[label] = {"key": key, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        if not label.startswith(RNG):
            digest.update(raw_bytes(tensor.reshape(-1)))
    own_hash = digest.hexdigest() if any(not label.startswith(RNG) for label in own) else ""
    keys = [one.key for one in parts[: len(entries)]]
    passing = PassingHash(keys, snapshot.shares) if alone else None
    try:
        file, flusher = write_file(part / name, parts, watch=passing.take if passing else None)
    except FileNotFoundError as error:
        raise RunError(f"{part.name}: {error.strerror}; {SHARED}") from None
    flushers.append(flusher)
    state_hash = passing.hexdigest() if passing else ""
    return _Written(file, entries, own, dict(snapshot.numbers), own_hash, host, state_hash)


def _take_hash(
    part: Path, snapshot: Snapshot, everyone: Sequence[_Written], unlike: StateHashes | None
) -> tuple[dict[str, Any], StateHashes]:
    """Return the manifest's values, and the hashes of the state that the files hold."""
    files: dict[str, Mapping[str, Any]] = {}
    for rank, one in enumerate(everyone):
        files[rank_file(rank)] = dict(one.file)
        if _size_of(part / rank_file(rank)) != one.file["bytes"]:
            raise RunError(f"it does not see what rank {rank} on {one.host} has written; {SHARED}")
    tensors = _gather_entries(everyone)
    own = [{"numbers": dict(one.numbers), "tensors": dict(one.own)} for one in everyone]
    values = {"format": FORMAT, "step": snapshot.step, **snapshot.values, "files": files}
    values |= {"ranks": own, "tensors": tensors_as_json(tensors)}
    state_hash = everyone[0].state_hash or hash_of_files(part, Manifest(values, tensors))
    saved = StateHashes(state_hash, "".join(one.own_hash for one in everyone))
    own_hashes = "", saved.own_hash  # a state that was loaded has none
    if unlike and saved.state_hash == unlike.state_hash and unlike.own_hash in own_hashes:
        raise RunError(
            f"it is the state of the checkpoint before, bit for bit (state hash {state_hash}), "
            "though steps in between had a learning rate and a gradient: what is saved is not what "
            "is trained, or the steps change nothing"
        )
    return {**values, "state_hash": state_hash}, saved


def _commit(part: Path, folder: Path, values: Mapping[str, Any], saved: StateHashes) -> StateHashes:
    """Write the manifest and give the folder its name."""
    write_flushed(part / MANIFEST, seal(values))
    flush_folder(part)
    if folder.exists():  # of an earlier run of these steps
        old = replaced_name(folder)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(part, folder)
        flush_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(part, folder)
        flush_folder(folder.parent)
    return saved


def _size_of(path: Path) -> int | None:
    """Return the bytes of a file as a process that opens it now sees them, None: it sees none."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None


def _gather_entries(everyone: Sequence[_Written]) -> dict[tuple[str, str], Entry]:
    """Return the canonical tensors of all ranks; raises RunError unless each is there once."""
    tensors: dict[tuple[str, str], Entry] = {}
    for one in everyone:
        for name, key, dtype, shape, place in one.entries:
            entry = tensors.setdefault((name, key), Entry(dtype, shape, []))
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise RunError(f"{name} {key}: ranks hold it as {entry[:2]} and {(dtype, shape)}")
            entry.pieces.append(place)  # type: ignore[attr-defined]
    for (name, key), entry in tensors.items():
        if problem := uncovered(entry):
            raise RunError(f"{name} {key}: {problem} among what the ranks hold")
    return tensors
