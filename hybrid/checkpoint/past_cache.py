"""Writes and reads past the system's cache of files, whose memory may take longer than the disk.

Such a write or read (O_DIRECT) goes between the disk and the program's own memory. Where that is in
huge pages the disk is handed few large pieces, which about doubles its rate under a hypervisor
(`benchmarks/LOG.md`). https://man7.org/linux/man-pages/man2/open.2.html"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

ROOM_BYTES = 2**24  # of a file that is written
READ_BYTES = 2**23  # of a file at once at most, while the block before is in use
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


def _make_room(size: int) -> mmap.mmap:
    """Return new memory, in huge pages where the system has them."""
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):
        room.madvise(mmap.MADV_HUGEPAGE)
    return room


class PastCache:
    """Writes a file past the system's cache of files, where its file system can.

    Such writes have whole blocks of the disk, in the place and in memory; so all goes through a
    buffer."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._room, self._filled = file, _make_room(ROOM_BYTES), 0
        self._set_direct(True)

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~O_DIRECT
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | O_DIRECT if direct else flags)
        except OSError as error:  # a tmpfs has no disk
            if error.errno != errno.EINVAL:
                raise

    def write(self, block: bytes | memoryview) -> int:
        """Take a whole block, and return its size in bytes."""
        rest = memoryview(block)
        while rest:
            taken = min(len(rest), ROOM_BYTES - self._filled)
            self._room[self._filled : self._filled + taken] = rest[:taken]
            self._filled, rest = self._filled + taken, rest[taken:]
            if self._filled == ROOM_BYTES:
                self._write_out()
        return len(block)

    def end(self) -> None:
        """Write what is left, which fills no block of the disk; `Flusher` flushes it."""
        self._set_direct(False)
        self._write_out()

    def _write_out(self) -> None:
        rest, self._filled = memoryview(self._room)[: self._filled], 0
        while rest:
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._set_direct(False)  # its blocks are larger, or it cannot after all
                rest = rest[self._file.write(rest) :]


def read_past_cache(file: BinaryIO) -> Iterator[memoryview]:
    """Yield a file's content in blocks as the disk has it, each gone when the next one comes.

    Where the file system cannot do that, it comes through the system's cache of files."""
    pages = 1 + os.fstat(file.fileno()).st_size // mmap.PAGESIZE
    size = min(READ_BYTES, pages * mmap.PAGESIZE)  # all of a room becomes memory
    rooms = [memoryview(_make_room(size)) for _ in range(2)]
    with _Source(file) as source, ThreadPoolExecutor(1) as thread:  # which reads one block ahead
        ahead, place = thread.submit(source.fill, rooms[0], 0), 0
        while count := ahead.result():
            block, place = rooms[0][:count], place + count
            rooms.reverse()
            ahead = thread.submit(source.fill, rooms[0], place)
            yield block


class _Source:
    """Fills rooms from a file, past the cache where a whole block is left and that can be done."""

    def __init__(self, file: BinaryIO) -> None:
        self._number = file.fileno()
        self._past: int | None = None

    def __enter__(self) -> "_Source":
        with contextlib.suppress(OSError):  # no such folder, or no such file system
            if O_DIRECT:  # a place and flags of its own, of the very same file
                self._past = os.open(f"/proc/self/fd/{self._number}", os.O_RDONLY | O_DIRECT)
        return self

    def __exit__(self, *_: object) -> None:
        if self._past is not None:
            os.close(self._past)

    def fill(self, room: memoryview, place: int) -> int:
        """Return how many bytes from `place` on are in `room` now: fewer only at the file's end."""
        size = 0 if self._past is None else self._read_past(self._past, room, place)
        while size < len(room):
            more = os.preadv(self._number, [room[size:]], place + size)
            if not more:
                break
            size += more
        return size

    def _read_past(self, past: int, room: memoryview, place: int) -> int:
        try:
            return os.preadv(past, [room], place)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return 0  # its blocks are larger, or it cannot after all
