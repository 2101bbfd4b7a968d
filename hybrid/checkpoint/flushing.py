"""Makes files and folders that are on the disk, not only in memory, when the call returns."""

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

FLUSH_EVERY_S = 0.1  # while a file is being written


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
