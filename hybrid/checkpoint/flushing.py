"""Makes files and folders that are on the disk, not only in memory, when the call returns."""

import errno
import fcntl
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

FLUSH_EVERY_S = 0.1  # while a file is being written
ROOM_BYTES = 2**24
READ_BYTES = 2**22
RWF_DONTCACHE = 0x80  # of linux/fs.h; Python has no name for it


def make_folder(path: Path) -> None:
    """Make a folder, and flush the names of the folders around it that are new.

    One that is there already is removed."""
    if path.exists():
        shutil.rmtree(path)
    new = [parent for parent in path.parents if not parent.exists()]
    path.mkdir(parents=True)
    for parent in new:
        flush_folder(parent.parent)


def write_flushed(path: Path, text: str) -> None:
    """Write a new file, and flush it."""
    with path.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class Flusher(threading.Thread):
    """Flushes a file to the disk while it is being written, and after `finish` once more.

    A disk is busy then while the rest is copied and hashed, not afterwards alone."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(daemon=True)
        self._file, self._written = file, threading.Event()
        self._error: OSError | None = None
        self.start()

    def run(self) -> None:
        """Flush until the whole file is on the disk."""
        try:
            while not self._written.wait(FLUSH_EVERY_S):
                os.fdatasync(self._file.fileno())
            os.fdatasync(self._file.fileno())
        except OSError as error:
            self._error = error

    def end(self) -> None:
        """Tell that all is written; this does not wait."""
        self._written.set()

    def finish(self) -> None:
        """Wait until all is on the disk, and close the file; raises OSError where it is not."""
        self.end()
        self.join()
        self._file.close()
        if self._error is not None:
            raise self._error


class PastCache:
    """Writes a file past the system's cache of files (O_DIRECT), where its file system can.

    For a file that nobody reads soon: the cache's memory may take longer than the disk. Such writes
    have whole blocks of the disk, in the place and in memory; so all goes through a buffer."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._room, self._filled = file, mmap.mmap(-1, ROOM_BYTES), 0
        self._set_direct(True)

    def _set_direct(self, direct: bool) -> None:
        flag = getattr(os, "O_DIRECT", 0)  # Linux has it
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~flag
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | flag if direct else flags)
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


def read_in_passing(file: BinaryIO) -> Iterator[memoryview]:
    """Yield a file's content in blocks, each gone when the next one comes.

    Whatever the system's cache of files had of it is read from there; the rest does not stay there,
    since the cache's memory may take longer than the disk and the content's hash together. Where
    the kernel (before 6.14) or the file system cannot do that, the rest stays there."""
    room, place = memoryview(bytearray(READ_BYTES)), 0
    flags = RWF_DONTCACHE if hasattr(os, "RWF_NOWAIT") else 0  # Linux has flags of a read
    while True:
        try:
            size = os.preadv(file.fileno(), [room], place, flags)
        except OSError as error:
            if not flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            flags = 0
            continue
        if not size:
            return
        yield room[:size]
        place += size


def flush_file(path: Path) -> None:
    """Flush a file's content that another library has written."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(number)
    finally:
        os.close(number)


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    except OSError as error:  # not every file system can, which PostgreSQL passes over as well
        if error.errno not in (errno.EINVAL, errno.EBADF):  # (fsync_fname_ext)
            raise
    finally:
        os.close(number)
