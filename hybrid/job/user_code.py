"""This module finds where in a user's own files an error arose. It needs no torch."""

import os
import site
import sysconfig
import traceback
from pathlib import Path

_OWN = str(Path(__file__).parents[1])


def user_line(error: BaseException) -> str | None:
    """Return `file:line` of the innermost line of an error that is a user's own.

    Lines of Python's standard library, of installed packages and of this package are not. Returns
    None where there is no other line. A file below the working folder is named from there."""
    found = None
    for frame in traceback.extract_tb(error.__traceback__):
        if os.path.isfile(frame.filename) and not _is_library(os.path.realpath(frame.filename)):
            found = f"{_short(os.path.abspath(frame.filename))}:{frame.lineno}"
    return found


def _is_library(file: str) -> bool:
    paths = sysconfig.get_paths()
    roots = [_OWN, paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]]
    roots += [*site.getsitepackages(), site.getusersitepackages()]
    return any(file.startswith(os.path.realpath(root) + os.sep) for root in roots)


def _short(file: str) -> str:
    try:
        shorter = os.path.relpath(file)
    except (ValueError, OSError):  # another drive, or a working folder that is gone
        return file
    return file if shorter.startswith("..") else shorter
