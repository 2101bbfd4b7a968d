"""Every error class of the toolkit, and the exit status that each means for a command. No torch.

| error | whose it is | exit status |
|---|---|---|
| `JobError`, `LayoutError` | the job's or the command line's author | 2 |
| `Unsupported` | nobody's: this strategy cannot run this job here | 2 |
| `ModuleNotFoundError` | the machine lacks a package | 3 |
| `RunError`, `StartError`, `PeerFailed`, `RunFailed` | the run's | 1 |
"""

from __future__ import annotations

import dataclasses
import socket

from ..layout import LayoutError
from ..records import Kind


class JobError(ValueError):
    """The job or the command line is wrong. The message is one line for its author."""


class Unsupported(ValueError):
    """A strategy cannot run this job on these processes. A record says `not_possible`, which is no
    failure."""


class RunError(RuntimeError):
    """A run must not go on: ranks disagree, a receipt is refused, or a loss is not finite."""


class StartError(RuntimeError):
    """The ranks of a run did not meet at the rendezvous."""


class PeerFailed(RuntimeError):
    """This rank ends because another one failed; the message names that rank."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """The first cause of a failed run. `details` is a traceback or the end of a log; `kind` is
    `job` (a mistake in the job), `unsupported` or `error` (an error of the run)."""

    rank: int
    message: str
    details: str
    kind: Kind = "error"


class RunFailed(RuntimeError):
    """The processes of a run ended without a result; `failure` is the first cause."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"rank {failure.rank} on {socket.gethostname()}: {failure.message}")
        self.failure = failure


def kind_of(error: BaseException) -> Kind:
    """Whose fault an error is, as a `Failure` has it."""
    if isinstance(error, Unsupported):
        return "unsupported"
    return "job" if isinstance(error, (JobError, LayoutError)) else "error"


def exit_status(error: BaseException) -> int | None:
    """The status of a command that ends with this error; None where it needs a traceback."""
    if kind_of(error) != "error":
        return 2
    if isinstance(error, RunFailed):
        return 1 if error.failure.kind == "error" else 2
    if isinstance(error, ModuleNotFoundError) and error.name != "hybrid":
        return 3
    return 1 if isinstance(error, PeerFailed) else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name where it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
