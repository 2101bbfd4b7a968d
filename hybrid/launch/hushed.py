"""This module keeps what libraries print while they read a file from standing beside our one line.

transformers draws bars and tables, and libraries in Rust print a panic before they raise it."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Drop what this process writes to its standard output and error while the context lasts.

    What Python writes goes the same way, also to a stream in their place. A panic is raised as an
    Exception."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nothing, number)
        try:
            with (
                open(nothing, "w", closefd=False) as nowhere,
                contextlib.redirect_stdout(nowhere),
                contextlib.redirect_stderr(nowhere),
            ):
                yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of pyo3, no Exception
                raise
            raise ValueError(f"cannot be read: {error}") from error
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)
