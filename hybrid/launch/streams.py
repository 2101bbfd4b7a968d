"""This module begins a command: streams that cannot fail it, and a signal that says its name.

A standard output that is closed, full or a pipe that nobody reads any more would turn a good run
into a failed one. A descriptor that is closed would be given to the next file that is opened, which
would then hold what libraries print. The module needs as little as a module can: it is imported
before all others, so that a signal is answered from the first moment on."""

import contextlib
import errno
import io
import os
import signal
import sys
from types import FrameType
from typing import Any, TextIO

NAMES = {0: "stdin", 1: "stdout", 2: "stderr"}
_QUIET = {errno.EPIPE, errno.EBADF}  # nobody wants to read it


class _Lasting(io.FileIO):
    """Writes to a descriptor and drops what cannot be written; `problem` is the first reason."""

    problem: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.problem = self.problem or error
            return memoryview(data).nbytes


def begin() -> None:
    """Make the streams of this process last, and have SIGTERM say its name from now on."""
    signal.signal(signal.SIGTERM, _end_at_once)
    for number in NAMES:
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing == number:  # the lowest that is free
                os.set_inheritable(number, True)
            else:
                os.dup2(nothing, number)
                os.close(nothing)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout, sys.stderr = lasting(sys.stdout, 1), lasting(sys.stderr, 2)


def lasting(stream: TextIO | None, number: int) -> TextIO:
    """Return a stream to a descriptor like `stream`, whose writes never raise.

    A character that its encoding has not is escaped."""
    raw = _Lasting(number, "w", closefd=False)
    lines = number == 2 or raw.isatty()
    through = bool(getattr(stream, "write_through", False))
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding,
        "backslashreplace",
        line_buffering=lines,
        write_through=through,
    )


def problem_of(stream: Any) -> str:
    """Return why not all of a command's output could be written; empty where nobody misses it."""
    found = getattr(getattr(getattr(stream, "buffer", None), "raw", None), "problem", None)
    if found is None or found.errno in _QUIET:
        return ""
    return f"the standard output could not be written: {found.strerror}"


def _end_at_once(number: int, frame: FrameType | None = None) -> None:
    """End this process, which has not begun anything yet."""
    if "--parent" not in sys.argv:
        os.write(2, b"hybrid: stopped by SIGTERM before it began\n")
    os._exit(128 + signal.SIGTERM)
