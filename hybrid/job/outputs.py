"""This module refuses, in one line and before anything runs, a path that cannot be written to.

It makes the folder, since only the system knows what can be made: a file may be in the way, the
name too long, a file system read-only. It needs no torch."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ..records.whole import part_of
from .errors import NO_ROOM, JobError, NoRoom
from .reading import show

# The folder is a right one, and the machine gives no room or no right to write there.
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
_VALID = "valid: a folder that is there or can be made"


def read_folder(given: Path | str, option: str = "--out") -> Path:
    """Return the path that a folder for results, or a file, is named by.

    Raises JobError where it is empty, which Python takes for the current folder."""
    text = os.fspath(given)
    if not text or "\0" in text:
        raise JobError(f"{option} = {show(text)}: no path is named so; {_VALID}")
    return Path(text)


def as_word(path: Path) -> str:
    """Return a path as a command line takes it: one with a dash first would be an option there."""
    return f"./{path}" if str(path).startswith("-") else str(path)


@contextlib.contextmanager
def makes(path: Path, option: str = "--out", valid: str = _VALID) -> Iterator[None]:
    """Raise JobError or NoRoom in place of an error by which the system refuses this path."""
    try:
        yield
    except OSError as error:
        words = error.strerror or str(error)
        if error.errno in _REFUSED:
            raise NoRoom(f"{path}: {NO_ROOM}{words}") from None
        if error.errno == errno.EEXIST and error.filename:
            words = f"{show(str(error.filename))} is there and is no folder"
        raise JobError(f"{option} = {show(str(path))}: cannot be made: {words}; {valid}") from None


def make_folder(folder: Path) -> list[Path]:
    """Make a folder with those above it, and return what was not there before, the outermost first.

    Raises OSError, and leaves nothing behind then."""
    made = list[Path]()
    try:
        for path in (*reversed(folder.parents), folder):
            if os.path.isdir(path):
                continue
            try:
                path.mkdir()
            except FileExistsError:
                if not os.path.isdir(path):  # else another process has made it meanwhile
                    raise
            else:
                made.append(path)
    except BaseException:
        remove_folders(made)
        raise
    return made


def remove_folders(made: list[Path]) -> None:
    """Remove folders that `make_folder` returned, those that are still empty."""
    with contextlib.suppress(OSError):
        for path in reversed(made):
            path.rmdir()


def check_new(path: Path, option: str = "--to") -> None:
    """Raise JobError or NoRoom where no file of this name can be made, and leave nothing behind."""
    valid = "valid: a path that is not there, in a folder that is there or can be made"
    if not path.name:
        raise JobError(f"{option} = {show(str(path))}: names no file; {valid}")
    with makes(path, option, valid):
        if os.path.lexists(path):
            raise JobError(f"{option} {path}: is there already; valid: a path that is not")
        made = make_folder(path.parent)
        try:
            part = part_of(path)  # the longest name that is written before the file has its own
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            part.unlink()
        finally:
            remove_folders(made)
