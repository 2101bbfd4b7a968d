"""This module finds, in an error's traceback, the innermost line that is the user's own.

A file is the user's own if it belongs neither to this package nor to Python or an installed one.
Libraries wrap errors: a DataLoader's worker sends its traceback as text, which is read here too.
The module needs no torch."""

import functools
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from types import TracebackType

OWN_PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_SENT = "Original Traceback (most recent call last):"  # torch/_utils.py, ExceptionWrapper
_FRAME = re.compile(r'^\s*File "(.+)", line (\d+)', re.MULTILINE)
# The cells of a notebook and of an interactive session are no files.
_CELLS = ("<ipython-input", "<stdin>", "<python-input")


def users_line(error: BaseException) -> str:
    """Return FILE:LINE of the innermost line of the user's code in a traceback, empty if none.

    Where the error has no such line, those are looked at that it was raised from."""
    seen: set[int] = set()
    found, next_one = "", error
    while not found and next_one is not None and id(next_one) not in seen:
        seen.add(id(next_one))
        found = _in_one(next_one)
        implied = None if next_one.__suppress_context__ else next_one.__context__
        next_one = next_one.__cause__ or implied  # type: ignore[assignment]
    return found


def innermost_line(error: BaseException) -> str:
    """Return FILE:LINE where an error was raised, whoever's code that is; empty without a trace."""
    frames = [*_frames(error.__traceback__)]
    return f"{show_file(frames[-1][0])}:{frames[-1][1]}" if frames else ""


def line_outside(error: BaseException, *folders: str) -> str:
    """Return FILE:LINE of the innermost frame that is in none of these folders."""
    frames = [*_frames(error.__traceback__)]
    kept = [f for f in frames if not any(f"/{folder}/" in f[0] for folder in folders)]
    return f"{show_file(kept[-1][0])}:{kept[-1][1]}" if kept else ""


def is_raised_by(error: BaseException, *packages: str) -> bool:
    """Tell whether this package, or an installed one of these names, raised an error itself."""
    file = ([("", 0), *_frames(error.__traceback__)])[-1][0]
    own = os.path.realpath(file).startswith(OWN_PACKAGE + os.sep)
    return own or any(f"/{name}/" in file for name in packages)


def at_users_line(error: BaseException) -> str:
    """Return ", at FILE:LINE" of the user's line, to stand behind a message.
    It is empty if there is none, or if the message has it already."""
    line = users_line(error)
    return f", at {line}" if line and line not in text_of(error) else ""


def text_of(error: BaseException) -> str:
    """Return an error's message; of one whose class cannot tell it, that it cannot."""
    try:
        return str(error)
    except BaseException as raised:  # a user's class may raise anything
        return f"its __str__ raised {type(raised).__name__}"


def sent_message(error: BaseException) -> str:
    """Return the message of the error that a worker process sent as text, empty for others."""
    text = text_of(error)
    return text.rstrip().splitlines()[-1].strip() if _SENT in text else ""


def is_users(file: str) -> bool:
    """Tell whether a file, as a code object names it, is neither a library's nor this package's."""
    if file.startswith("<"):
        return file.startswith(_CELLS)
    path = os.path.realpath(file)
    return not any(path.startswith(folder + os.sep) for folder in _others())


def show_file(file: str) -> str:
    """Return a file's path as one would type it here: relative to this folder if it is below."""
    here = os.getcwd() + os.sep
    return file.removeprefix(here) if file.startswith(here) else file


def _in_one(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename and is_users(error.filename):
        return f"{show_file(error.filename)}:{error.lineno}"
    frames = [*_frames(error.__traceback__), *_sent_frames(error)]
    mine = [(file, number) for file, number in frames if is_users(file)]
    return f"{show_file(mine[-1][0])}:{mine[-1][1]}" if mine else ""


def _frames(trace: TracebackType | None) -> Iterator[tuple[str, int]]:
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next


def _sent_frames(error: BaseException) -> list[tuple[str, int]]:
    _, sent, text = text_of(error).partition(_SENT)
    return [(file, int(number)) for file, number in _FRAME.findall(text)] if sent else []


@functools.cache
def _others() -> tuple[str, ...]:
    """Return the folders of Python's own files, of installed packages, of commands, and ours."""
    paths = sysconfig.get_paths()
    keys = ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
    found = {OWN_PACKAGE, *(paths[key] for key in keys), site.getusersitepackages()}
    found |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return tuple(os.path.realpath(folder) for folder in found)
