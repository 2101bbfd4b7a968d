"""Writes files that a reader finds whole or not at all, whatever ends the process that writes.

Until all is written, a new file has a name in the same folder that nobody can foresee. No link is
followed, and what was there stays until the new file takes its name. A killed process leaves such a
part, which the next start removes by its name (`remove_parts`). Errors name the file that was to
become. The modes follow the umask. The module needs no torch."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

YOUNG_S = 10.0  # a folder that is just made may be locked next


def no_links(path: str, flags: int) -> int:
    """Open a file, as `open` takes it for `opener`, but none that a link leads to."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def part_of(path: Path) -> Path:
    """Return a name for what becomes `path`, which nobody can foresee."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


@contextlib.contextmanager
def naming(path: Path, part: Path | None = None) -> Iterator[None]:
    """Have an error of the system that names no file, as on a full disk, or `part` name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(part), part):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Give a name to write a new file to, which becomes `path` when the context ends well.

    Where it ends with an error, nothing of the new file stays."""
    part = part_of(path)
    with naming(path, part):
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Give a new file to write and read, which becomes `path` when the context ends well.

    It is on the disk then, so that after a crash of the machine there is the old file or this one.
    Where the context ends with an error, nothing of the new file stays."""
    with whole_path(path) as part, open(part, "x+b", opener=no_links) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; characters that are no UTF-8 stand escaped."""
    with whole_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Give a new file in the place of what is there, for what others read while it grows."""
    with naming(path):
        path.unlink(missing_ok=True)
        with open(path, "x+b", opener=no_links) as file:
            yield file


def parts_of(*paths: Path) -> list[Path]:
    """Return what is written to become one of these, or was left when its process was killed."""
    found = []
    for folder in {path.parent for path in paths}:
        names = "|".join(re.escape(path.name) for path in paths if path.parent == folder)
        part = re.compile(rf"\.(?:{names})\.[0-9a-f]{{16}}\.part")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found += [folder / name for name in os.listdir(folder) if part.fullmatch(name)]
    return found


@contextlib.contextmanager
def working_folder(path: Path, mode: int = 0o777) -> Iterator[Path]:
    """Give a new folder beside `path`, which is removed in the end with all that is in it.

    It is locked meanwhile. One that is not was left by a killed process, and goes as well. mode: of
    the folder, from which the umask takes."""
    for left in parts_of(path):
        with contextlib.suppress(OSError):
            found = left.lstat()
            if found.st_uid == os.getuid() and time.time() - found.st_ctime > YOUNG_S:
                with _opened(left) as number:
                    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
    folder = part_of(path)
    folder.mkdir(mode)
    try:
        with _opened(folder) as number:
            with contextlib.suppress(OSError):  # where there are no locks, none is removed above
                fcntl.flock(number, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield number
    finally:
        os.close(number)


def remove_parts(*paths: Path) -> None:
    """Remove what killed processes have left of these files; nothing may be writing them."""
    for part in parts_of(*paths):
        with contextlib.suppress(IsADirectoryError):
            part.unlink(missing_ok=True)
