"""Passes bytes from one process to another one of the same host, copied once.

They stand in memory that both have mapped, used round and round; a pipe tells the receiver how many
more there are, and a count in the memory tells the sender how many were taken. A pipe alone would
copy twice, and take longer than the hash for which this is made."""

import contextlib
import mmap
import os
import select
import struct
import time
from collections.abc import Callable
from pathlib import Path

from ..job.errors import RunError

ROOM_BYTES = 2**23  # at most, and no more than is sent
_START = mmap.PAGESIZE  # where what is sent begins; the count of what was taken stands before it
_LOOK_MS = 20  # between looks at whether the passing is still wanted
_FREE_S = 0.0005  # between looks at whether there is room again; all of it lasts for 5 ms
_SIZE = struct.Struct("<q")


class Left(RunError):
    """Says that the other process has left before all was passed."""


class _End:
    """Is one end of a channel; `wanted` raises what ends a wait. whole: the bytes to be sent."""

    def __init__(self, path: Path, flags: int, whole: int, wanted: Callable[[], None]) -> None:
        self._wanted, self._passed, self._room = wanted, 0, _room_for(whole)
        self._pipe = os.open(_pipe_of(path), flags | os.O_NONBLOCK)
        with _memory_of(path).open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _START + self._room)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN if flags == os.O_RDONLY else 0)

    def _at(self, size: int) -> memoryview:
        start = _START + self._passed % self._room
        return memoryview(self._memory)[start : start + size]

    def close(self) -> None:
        """Close this end; the other one notices."""
        os.close(self._pipe)  # the memory goes with what still looks at it


class Receiver(_End):
    """Receives what comes through a channel that it makes; raises OSError where it cannot.

    path: of the channel, to which endings are added."""

    def __init__(self, path: Path, whole: int, wanted: Callable[[], None]) -> None:
        try:
            with _memory_of(path).open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, _START + _room_for(whole))
            os.mkfifo(_pipe_of(path), 0o600)
            super().__init__(path, os.O_RDONLY, whole, wanted)
        except OSError:
            remove(path)
            raise

    def receive(self) -> memoryview:
        """Return bytes that have come; `release` tells that they are not needed any more."""
        while not self._poll.poll(_LOOK_MS):
            self._wanted()
        told = os.read(self._pipe, _SIZE.size)
        if not told:
            raise Left("the rank that passes this on has left")
        return self._at(*_SIZE.unpack(told))

    def release(self, size: int) -> None:
        """Give the room of so many bytes back."""
        self._passed += size
        _SIZE.pack_into(self._memory, 0, self._passed)


class Sender(_End):
    """Sends through a channel that a receiver of this host has made.

    Raises OSError where there is none: a receiver on another host reads nothing here."""

    def __init__(self, path: Path, whole: int, wanted: Callable[[], None]) -> None:
        super().__init__(path, os.O_WRONLY, whole, wanted)

    def send(self, block: memoryview) -> None:
        """Send a block; it arrives in one part or several."""
        while block:
            size = min(len(block), self._free(), self._room - self._passed % self._room)
            self._at(size)[:] = block[:size]
            os.write(self._pipe, _SIZE.pack(size))
            self._passed, block = self._passed + size, block[size:]

    def _free(self) -> int:
        """Wait for room, a quarter of all where that is in use, and return how many bytes."""
        while True:
            used: int = self._passed - _SIZE.unpack_from(self._memory)[0]
            if used <= self._room * 3 // 4:
                return min(self._room - used, max(1, self._room // 4))
            if self._poll.poll(0):
                raise Left("the rank that takes the hash has left")
            self._wanted()
            time.sleep(_FREE_S)


def remove(path: Path) -> None:
    """Remove the names of a channel; who has opened it keeps it."""
    for name in (_memory_of(path), _pipe_of(path)):
        with contextlib.suppress(FileNotFoundError):
            name.unlink()


def _room_for(whole: int) -> int:
    return max(1, min(whole, ROOM_BYTES))


def _memory_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.room")


def _pipe_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.pipe")
