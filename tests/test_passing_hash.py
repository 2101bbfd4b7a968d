"""The hash of a state that is taken while ranks, threads of this process, write it."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.checkpoint import channel, passing_hash, pieces, save
from hybrid.checkpoint.file_hash import hash_of_files
from hybrid.checkpoint.folders import verify
from hybrid.checkpoint.pieces import Piece, shares_of
from hybrid.checkpoint.snapshot import Snapshot
from hybrid.checkpoint.state_hash import hash_of_pieces
from hybrid.job.errors import RunError
from tests.saving_ranks import RANKS, VALUES, Ranks, names, only_error

ROOM = 64  # bytes, which are used round and round
DTYPES = torch.float32, torch.bfloat16, torch.uint8, torch.int64


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "ROOM_BYTES", ROOM)
    monkeypatch.setattr(passing_hash, "READ_BYTES", ROOM)
    monkeypatch.setattr(pieces, "BUFFER_BYTES", 1000)


def state() -> tuple[list[Piece], list[list[Piece]]]:
    """Nine tensors whole, and the odd parts of them that four ranks hold."""
    draw, whole, held = random.Random(7), [], [[] for _ in range(RANKS)]
    for number in range(9):
        size = draw.choice([0, 1, 11, 101, 1003])
        tensor = torch.randint(0, 99, (size,)).to(DTYPES[number % len(DTYPES)])
        whole.append(Piece(f"t{number}", "weight", (size,), tensor))
        cuts = sorted([0, size, *(draw.randint(0, size) for _ in range(RANKS - 1))])
        for rank, (first, end) in enumerate(itertools.pairwise(cuts)):
            if end > first or (rank == 2 and not size):
                part = tensor[first:end].clone()
                held[rank].append(Piece(f"t{number}", "weight", (size,), part, first))
    return whole, held


def save_held(folder: Path, held: list[list[Piece]]) -> list[Any]:
    """Save what the ranks hold."""
    ranks = Ranks()

    def work(rank: int) -> Any:
        snapshot = Snapshot(2, shares_of(held[rank]), {}, {}, VALUES)
        return save.save(folder, snapshot, rank, ranks.gather(rank))

    return ranks.run(work)


def hashing_threads() -> int:
    """How many threads of a save are still there."""
    return sum(isinstance(one, passing_hash.PassingHash) for one in threading.enumerate())


@pytest.mark.parametrize("without", [(), (2,), (1, 2, 3)])
def test_ranks_pass_on_what_they_hold_or_their_files_are_read(
    without: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank without a channel may be on another host that has the name of rank 0's."""
    begin, read = channel.Sender.__init__, passing_hash.PassingHash._opened
    files: set[str] = set()

    def joins(self: Any, path: Path, *rest: Any) -> None:
        if any(path.name == save.rank_file(rank) for rank in without):
            raise OSError(errno.ENXIO, "No such device or address")
        begin(self, path, *rest)

    def reads(self: Any, opened: Any, name: str) -> Any:
        files.add(name)
        return read(self, opened, name)

    monkeypatch.setattr(channel.Sender, "__init__", joins)
    monkeypatch.setattr(passing_hash.PassingHash, "_opened", reads)
    whole, held = state()
    found = save_held(tmp_path, held)
    assert {one.state_hash for one in found} == {hash_of_pieces(whole)}
    assert files == {save.rank_file(rank) for rank in without}
    folder = tmp_path / "step-00000002"
    manifest, problems = verify(folder, whole=True)
    assert manifest is not None and not problems
    assert hash_of_files(folder, manifest) == manifest.state_hash == found[0].state_hash
    assert sorted(os.listdir(folder)) == ["manifest.json", *map(save.rank_file, range(RANKS))]
    assert hashing_threads() == 0


@pytest.mark.parametrize("call", ["mkfifo", "posix_fallocate"])
def test_a_file_system_without_pipes_or_room_for_them(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, call, cannot)
    whole, held = state()
    assert {one.state_hash for one in save_held(tmp_path, held)} == {hash_of_pieces(whole)}
    assert verify(tmp_path / "step-00000002", whole=True)[1] == []


@pytest.mark.parametrize("guilty", [0, 2])
def test_a_rank_that_leaves_ends_the_save_on_all(
    guilty: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, sent = passing_hash.PassingHash._send, list[int]()

    def sends(self: Any, sender: Any) -> None:
        if self._rank == guilty:
            self._shares = self._shares[:2]
        send(self, sender)

    def takes(entries: Any, blocks: Any) -> str:
        for number, block in enumerate(b for (n, k), e in entries.items() for b in blocks(n, k, e)):
            sent.append(len(block))
            if number == 9:
                raise RunError("planted")
        return "never"

    monkeypatch.setattr(passing_hash.PassingHash, "_send", sends)
    if guilty == 0:
        monkeypatch.setattr(passing_hash, "hash_entries", takes)
    words = only_error(save_held(tmp_path, state()[1]), RunError)
    assert ("planted" if guilty == 0 else "has left") in words
    assert names(tmp_path) == [] and hashing_threads() == 0


def test_a_failed_write_ends_the_hash_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks whose write fails end what they pass on, and nobody waits for it."""
    write = save.write_file

    def writes(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == save.rank_file(3):
            raise OSError(errno.EIO, "Input/output error")
        return write(path, *arguments, **options)

    monkeypatch.setattr(save, "write_file", writes)
    monkeypatch.setattr(channel.Sender, "send", lambda self, block: self._wait_for_ever())
    monkeypatch.setattr(channel.Sender, "_wait_for_ever", _wait_for_ever, raising=False)
    words = only_error(save_held(tmp_path, state()[1]), RunError)
    assert "rank 3 on" in words and "Input/output error" in words
    assert names(tmp_path) == [] and hashing_threads() == 0


def _wait_for_ever(self: Any) -> None:
    while not self._poll.poll(1):
        self._wanted()
