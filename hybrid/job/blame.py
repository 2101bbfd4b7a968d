"""This module finds the innermost line of a user's own file in a traceback. It needs no torch."""

import os
import site
import sysconfig
import traceback
from pathlib import Path

from .errors import first_line

_PACKAGE = str(Path(__file__).parents[1])
_PLACES = {_PACKAGE, *sysconfig.get_paths().values(), *site.getsitepackages()}
_OTHERS = tuple(os.path.join(place, "") for place in _PLACES if place)
LONGEST = 300  # characters of a message that are shown


def tell_error(error: BaseException) -> str:
    """Return an error in one line: its class, its message and the user's line, `(file.py:12)`."""
    message = " ".join(first_line(error).split())
    if len(message) > LONGEST:
        message = f"{message[:LONGEST]} ..."
    kind = type(error).__name__
    place = find_line(error)
    words = kind if message == kind else f"{kind}: {message}"
    return f"{words} ({place})" if place else words


def find_line(error: BaseException) -> str | None:
    """Return `file.py:12`, the innermost line that is neither ours nor a library's, or None.

    A file below the working directory is shown from there, others by their whole path."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_theirs(frame.filename)]
    if not own:
        return None
    file = own[-1].filename
    here = os.path.join(os.getcwd(), "")
    return f"{file.removeprefix(here)}:{own[-1].lineno}"


def _is_theirs(file: str) -> bool:
    return not file.startswith("<") and not os.path.abspath(file).startswith(_OTHERS)
