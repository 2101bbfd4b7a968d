"""Saves a checkpoint: every rank its own pieces, rank 0 the manifest, and then the name.

The order is what makes it safe. A new folder gets a temporary name; every rank writes and flushes
its file there; rank 0 writes the manifest, flushes it and the folder, gives the folder its name and
flushes that; older checkpoints are removed only then. What a process leaves that is ended on the
way has a temporary name, by which the next start knows it (`folders.remove_unfinished`)."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..job.errors import NoRoom, RunError
from ..launch.serialization import sendable
from .flushing import Flusher, flush_folder, make_folder, write_flushed
from .folders import PART, folder_of, replaced_name
from .manifest import (
    FORMAT,
    MANIFEST,
    Entry,
    FilePiece,
    rank_file,
    seal,
    tensors_as_json,
    uncovered,
)
from .passing_hash import PassingHash, size_of
from .pieces import Share
from .ranks import Gather, Ranks
from .snapshot import Snapshot
from .tensors import Part, dtype_name, part_of_tensor, raw_bytes, write_file

RNG = "rng/"  # how the labels of generators' states begin, among the tensors of one rank
SHARED = "all hosts must share the file system of the run's folder"


@sendable
class StateHashes(NamedTuple):
    """Tells one state from another, by two hashes.

    They are that of the state, and that of what ranks have of their own beside it and their
    generators (empty where they have nothing)."""

    state_hash: str
    own_hash: str = ""


@sendable
class _Plan(NamedTuple):
    """Says what a rank is about to write of the canonical tensors, and on which host."""

    host: str
    size: int  # in bytes
    entries: Sequence[tuple[str, str, str, tuple[int, ...], FilePiece]]


@sendable
@dataclasses.dataclass(frozen=True)
class _Written:
    """Says what a rank has written."""

    file: Mapping[str, Any]
    own: Mapping[str, Any]
    numbers: Mapping[str, Any]
    own_hash: str


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
    passing = PassingHash(rank, snapshot.shares)
    try:
        sealed = _write_together(ranks, part, snapshot, passing, flushers, unlike)
        saved: StateHashes = ranks.first(lambda: _commit(part, folder, *sealed[0]))
    except BaseException as error:
        passing.give_up()
        if isinstance(error, NoRoom | RunError):
            _take_away(part, rank, flushers)
        raise
    ranks.first(tidy)
    return saved


def _write_together(
    ranks: Ranks,
    part: Path,
    snapshot: Snapshot,
    passing: PassingHash,
    flushers: list[Flusher],
    unlike: StateHashes | None,
) -> list[tuple[dict[str, Any], StateHashes]]:
    """Have all ranks write; return the manifest's values and the hashes on rank 0; collective."""
    found, tensors = list[tuple[dict[str, Any], StateHashes]](), dict[tuple[str, str], Entry]()
    rank = ranks.rank

    def write() -> _Written:
        if rank == 0:
            tensors.update(_gather_entries(plans))
        passing.begin(part, tensors, joined)
        return _write(part, snapshot, rank, flushers)

    def finish() -> None:
        if rank == 0:
            _require_seen(part, plans, written)
        state_hash = passing.finish()
        if rank == 0:
            found.append(_manifest(snapshot, written, tensors, state_hash, unlike))
        flushers[0].finish()

    plans: list[_Plan] = ranks.each(lambda: _plan(part, snapshot, rank))
    joined = _open_channels(ranks, part, plans, passing)
    written: list[_Written] = ranks.each(write)
    ranks.each(finish)
    return found


def _plan(part: Path, snapshot: Snapshot, rank: int) -> _Plan:
    """Return what a rank is about to write; rank 0 makes the folder."""
    if rank == 0:
        make_folder(part)
    entries = []
    for share in snapshot.shares:
        piece, key = share.piece, _key_of(share)
        place = FilePiece(rank_file(rank), key, share.start, share.count)
        entries.append((piece.name, piece.key, dtype_name(piece.tensor.dtype), piece.shape, place))
    return _Plan(socket.gethostname(), size_of(snapshot.shares), entries)


def _key_of(share: Share) -> str:
    """Return the key under which a rank's file has a share."""
    return f"{share.piece.key}/{share.piece.name}@{share.start}"


def _open_channels(
    ranks: Ranks, part: Path, plans: Sequence[_Plan], passing: PassingHash
) -> Sequence[bool]:
    """Open channels from the ranks of rank 0's host to it; return which ranks have one."""
    if len(plans) == 1:
        return [False]
    others = list(enumerate(plans))[1:]
    here = {rank: plan.size for rank, plan in others if plan.host == plans[0].host}
    ranks.first(lambda: passing.open_channels(part, here))
    return ranks.each(lambda: passing.join_channel(part))


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


def _write(part: Path, snapshot: Snapshot, rank: int, flushers: list[Flusher]) -> _Written:
    """Write this rank's file; what flushes it to the disk is added to `flushers`."""
    parts = [Part(_key_of(s), s.piece.tensor.dtype, s.count, s.read) for s in snapshot.shares]
    own: dict[str, Any] = {}
    digest = hashlib.sha256()
    for label, tensor in sorted(snapshot.own.items()):
        key = f"own/{label}"
        parts.append(part_of_tensor(key, tensor))
        own[label] = {"key": key, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        if not label.startswith(RNG):
            digest.update(raw_bytes(tensor.reshape(-1)))
    own_hash = digest.hexdigest() if any(not label.startswith(RNG) for label in own) else ""
    try:
        file, flusher = write_file(part / rank_file(rank), parts, past_cache=True)
    except FileNotFoundError as error:
        raise RunError(f"{part.name}: {error.strerror}; {SHARED}") from None
    flushers.append(flusher)
    return _Written(file, own, dict(snapshot.numbers), own_hash)


def _require_seen(part: Path, plans: Sequence[_Plan], written: Sequence[_Written]) -> None:
    """Require that rank 0 sees what each rank has written."""
    for rank, (plan, one) in enumerate(zip(plans, written, strict=True)):
        if _size_of(part / rank_file(rank)) != one.file["bytes"]:
            raise RunError(f"it does not see what rank {rank} on {plan.host} has written; {SHARED}")


def _manifest(
    snapshot: Snapshot,
    written: Sequence[_Written],
    tensors: Mapping[tuple[str, str], Entry],
    state_hash: str,
    unlike: StateHashes | None,
) -> tuple[dict[str, Any], StateHashes]:
    """Return the manifest's values, and the hashes of the state that the files hold."""
    own = [{"numbers": dict(one.numbers), "tensors": dict(one.own)} for one in written]
    files = {rank_file(rank): dict(one.file) for rank, one in enumerate(written)}
    values = {"format": FORMAT, "step": snapshot.step, **snapshot.values, "files": files}
    values |= {"ranks": own, "tensors": tensors_as_json(tensors)}
    saved = StateHashes(state_hash, "".join(one.own_hash for one in written))
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


def _gather_entries(plans: Sequence[_Plan]) -> dict[tuple[str, str], Entry]:
    """Return the canonical tensors of all ranks; raises RunError unless each is there once."""
    tensors: dict[tuple[str, str], Entry] = {}
    for plan in plans:
        for name, key, dtype, shape, place in plan.entries:
            entry = tensors.setdefault((name, key), Entry(dtype, shape, []))
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise RunError(f"{name} {key}: ranks hold it as {entry[:2]} and {(dtype, shape)}")
            entry.pieces.append(place)  # type: ignore[attr-defined]
    for (name, key), entry in tensors.items():
        if problem := uncovered(entry):
            raise RunError(f"{name} {key}: {problem} among what the ranks hold")
    return tensors
