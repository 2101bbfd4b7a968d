"""Files written and read past the system's cache are whole, whatever the system can do of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest

from hybrid.checkpoint import past_cache
from hybrid.checkpoint.tensor_file import sha256_of


@pytest.mark.parametrize("refused", [0, 1, 3])  # the write that finds no such disk; 0: none does
def test_what_is_written_past_the_cache_is_whole(
    refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk(io.FileIO):
        writes = 0

        def write(self, block: Any) -> int:
            self.writes += 1
            if self.writes == refused:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().write(block[:4096])  # a part of it

    monkeypatch.setattr(past_cache, "ROOM_BYTES", 2**13)
    blocks = [random.Random(size).randbytes(size) for size in (8, 1001, 0, 30_011, 2**13, 5)]
    with Disk(tmp_path / "file", "xb") as file:
        past = past_cache.PastCache(file)
        assert [past.write(block) for block in blocks] == [len(block) for block in blocks]
        past.end()
    assert (tmp_path / "file").read_bytes() == b"".join(blocks)


@pytest.mark.parametrize("error", [None, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
@pytest.mark.parametrize("part", [1001, 2**13])  # of a block, that a read gives
def test_the_hash_of_a_file_that_is_read_once(
    part: int, error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot read past its cache, it reads; what else fails is told."""
    read, ways, path = os.preadv, set(), tmp_path / "file"

    def preadv(number: int, rooms: Any, place: int) -> int:
        direct = bool(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT)
        ways.add(direct)
        if direct and error:
            raise OSError(error, os.strerror(error))
        return read(number, [rooms[0][:part]] if not direct else rooms, place)

    monkeypatch.setattr(past_cache, "READ_BYTES", 2**13)
    monkeypatch.setattr(os, "preadv", preadv)
    for size in (0, 1001, 2**13, 30_011):
        path.write_bytes(random.Random(size).randbytes(size))
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        assert sha256_of(path, again=True) == expected
        if error == errno.EIO:
            with pytest.raises(OSError, match="Input/output error"):
                sha256_of(path)
        else:
            assert sha256_of(path) == expected
    with contextlib.suppress(OSError):  # a tmpfs of an old kernel is all cache
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        assert True in ways


def test_a_file_is_read_where_no_other_way_to_it_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object) -> int:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    (tmp_path / "file").write_bytes(b"abc" * 1001)
    monkeypatch.setattr(os, "open", opened)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 1001).hexdigest()
