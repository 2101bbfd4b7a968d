"""This module does what may hang, and goes on after some seconds if it does."""

import _thread
from collections.abc import Callable


def run_within(seconds: float, work: Callable[[], object]) -> bool:
    """Do the work in a thread, and wait so long for its end; returns False where none was made.

    Where memory has run out, a new thread may end before it begins, which `threading.Thread.start`
    would wait for without an end."""
    done = _thread.allocate_lock()
    done.acquire()

    def run() -> None:
        try:
            work()
        finally:
            done.release()

    try:
        _thread.start_new_thread(run, ())
    except (RuntimeError, MemoryError):  # a thread's stack finds no room
        return False
    done.acquire(timeout=seconds)
    return True
