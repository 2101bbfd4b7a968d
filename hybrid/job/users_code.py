"""This module takes what a user's code raises, or how it leaves, for a fault of that code.

A function of one's own may raise anything, also what is no `Exception`, and may end the program
while it is imported or called. None of that may look like a run that ended well. The module needs
no torch."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import NoReturn

from .errors import Unsupported, is_our_exit


class _Left(SystemExit):
    """Is raised in place of an `os._exit` of the user's code."""


def passes(error: BaseException) -> bool:
    """Tell whether an error that came out of a user's code is no fault of that code.

    That is Ctrl-C, a signal that this package handles, a lack of memory, and the toolkit's own
    word that a strategy cannot run the job."""
    if isinstance(error, (KeyboardInterrupt, MemoryError, Unsupported)):
        return True
    return is_our_exit(error) and not isinstance(error, _Left)


@contextlib.contextmanager
def held_exit() -> Iterator[None]:
    """Have `os._exit` raise a SystemExit in this thread while the context lasts.

    Else a module that calls it would end the command with the status of a success. Other threads,
    and processes that are forked meanwhile, leave as they ask for."""
    leave, here = os._exit, (os.getpid(), threading.get_ident())

    def raise_instead(status: int) -> NoReturn:
        if (os.getpid(), threading.get_ident()) != here:
            leave(status)
        raise _Left(status)

    os._exit = raise_instead
    try:
        yield
    finally:
        os._exit = leave
