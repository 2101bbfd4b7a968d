"""Makes files and folders that are on the disk, not only in memory, when the call returns."""

import errno
import os
import shutil
from pathlib import Path


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


def flush_file(path: Path) -> None:
    """Flush a file's content.

    An error of writing it that nobody has been told of yet is told to whoever opens it next
    (Linux, lib/errseq.c: errseq_sample)."""
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
