"""This module defines every error class and the exit status that each means for a command.

| error | who made the mistake | exit status |
|---|---|---|
| `JobError`, `LayoutError` | the author of the job or of the command line | 2 |
| `Unsupported` | nobody: this strategy cannot run this job here | 2 |
| `ModuleNotFoundError` | the machine lacks a package | 3 |
| `RunError`, `StartError`, `PeerFailed`, `RunFailed` | the run itself failed | 1 |
| `CheckFailed` | the job's own code raised while it was tried out | 1 |

The module needs no torch."""

import dataclasses
import socket

from ..layout import LayoutError
from ..records import Kind


class JobError(ValueError):
    """Says in one line, for the author, what is wrong in the job or the command line."""


class Unsupported(ValueError):
    """Says why a strategy cannot run this job on these processes.

    The run's record then says `not_possible`, which is no failure."""


class RunError(RuntimeError):
    """Ends a run where ranks disagree, a receipt is refused, or a loss is not finite."""


class StartError(RuntimeError):
    """Says that the ranks of a run did not meet at the rendezvous."""


class PeerFailed(RuntimeError):
    """Ends this rank because another one failed; the message names that rank."""


class CheckFailed(RuntimeError):
    """Says that a job's own code raised while the job was checked; its traceback is on stderr."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Holds the first cause of a failed run.

    `details` is a traceback or the end of a log; `kind` is `job` (a mistake in the job),
    `unsupported` or `error` (an error of the run)."""

    rank: int
    message: str
    details: str
    kind: Kind = "error"


class RunFailed(RuntimeError):
    """Says that a run's processes ended without a result; `failure` is the first cause."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"rank {failure.rank} on {socket.gethostname()}: {failure.message}")
        self.failure = failure


def kind_of(error: BaseException) -> Kind:
    """Return the `kind` of a `Failure` that an error means."""
    if isinstance(error, Unsupported):
        return "unsupported"
    return "job" if isinstance(error, (JobError, LayoutError)) else "error"


def exit_status(error: BaseException) -> int | None:
    """Return the status of a command that ends so, or None if the error needs a traceback."""
    if kind_of(error) != "error":
        return 2
    if isinstance(error, RunFailed):
        return 1 if error.failure.kind == "error" else 2
    if isinstance(error, ModuleNotFoundError) and error.name != "hybrid":
        return 3
    return 1 if isinstance(error, (PeerFailed, CheckFailed)) else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
