"""This module knows whether this rank waits for others, since each blocking call says so.

Code that waits for another rank stands in `with waiting(WHAT):`; `hybrid.launch.blocking_calls`
does the same around the calls of torch. Nothing is guessed from what a thread executes. A rank that
does not wait while the others do is the one they wait for (`hybrid.launch.blame`). Entering and
leaving takes less than a microsecond. The module needs no torch."""

import dataclasses
import threading
from types import TracebackType


@dataclasses.dataclass
class _Thread:
    """Holds what one thread waits for; `aside`: it does not train, such as one that saves."""

    depth: int = 0
    what: str = ""
    aside: bool = False


_threads: dict[int, _Thread] = {}
_entered = [0]  # waits so far, by which one tells whether a rank still waits in the same one


def _of(thread: int) -> _Thread:
    found = _threads.get(thread)
    if found is None:
        found = _threads[thread] = _Thread()
    return found


class waiting:
    """Says that this thread waits for other ranks while the context lasts; the outermost counts.

    what: what it waits for, as in "waits for WHAT"."""

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        enter(self.what)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        leave()


def enter(what: str, thread: int | None = None) -> None:
    """Begin a wait of this thread, or of the one with this identifier; `leave` ends it there."""
    waits = _of(thread or threading.get_ident())
    waits.depth += 1
    if waits.depth == 1:
        waits.what = what
        _entered[0] += 1


def leave() -> None:
    """End the wait that began last in this thread."""
    _of(threading.get_ident()).depth -= 1


def stand_aside() -> None:
    """Say that this thread does not train: its waits are not the rank's."""
    _of(threading.get_ident()).aside = True


def thread_waits(thread: threading.Thread | None) -> bool:
    """Tell whether another thread of this process waits for other ranks."""
    found = _threads.get(thread.ident or 0) if thread else None
    return bool(found and found.depth)


def waits_for() -> str:
    """Return what this rank waits for, empty where it does not."""
    for found in list(_threads.values()):
        if found.depth and not found.aside:
            return found.what
    return ""


def num_waits() -> int:
    """Return how many waits have begun in this process."""
    return _entered[0]
