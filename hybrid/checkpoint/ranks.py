"""Has all ranks do their parts of a save: a problem of one ends it on all, in the same words."""

import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..job.errors import NoRoom, RunError, needs_room
from ..launch.serialization import sendable

Gather = Callable[[Any], list[Any]]  # returns every rank's value


@sendable
class _Problem(NamedTuple):
    """Says what a rank could not do. room: it lacked room, or the right to write."""

    words: str
    room: bool
    host: str

    def error(self, rank: int, step: int) -> Exception:
        """Return the error that ends the run, the same on every rank."""
        who = f"rank {rank} on {self.host}"
        if self.room:
            return NoRoom(f"{self.words} ({who}, saving the state after {step} steps)")
        return RunError(f"{who} could not save the state after {step} steps: {self.words}")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Has all ranks do their parts of a save, and raises the first problem of one on all."""

    rank: int
    gather: Gather
    checkpoints: Path
    step: int

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """Do a part on every rank, and return what it came to on each; collective."""
        return self._exchange(*_try(work, self.checkpoints))

    def first(self, work: Callable[[], Any]) -> Any:
        """Do a part on rank 0, and return there what it came to; collective."""
        mine = _try(work, self.checkpoints) if self.rank == 0 else (None, None)
        return self._exchange(*mine)[0]

    def _exchange(self, value: Any, problem: _Problem | None) -> list[Any]:
        answers = self.gather((value, problem))
        for number, (_, found) in enumerate(answers):
            if found is not None:
                raise found.error(number, self.step)
        return [answer for answer, _ in answers]


def _try(work: Callable[[], Any], checkpoints: Path) -> tuple[Any, _Problem | None]:
    """Return what `work` returns, and what went wrong: other ranks wait to hear of it."""
    host = socket.gethostname()
    try:
        with needs_room(checkpoints):
            return work(), None
    except Exception as error:
        words = str(error) or type(error).__name__
        if isinstance(error, OSError):
            words = f"{Path(str(error.filename or '')).name}: {error.strerror}".removeprefix(": ")
        return None, _Problem(words, isinstance(error, NoRoom), host)
