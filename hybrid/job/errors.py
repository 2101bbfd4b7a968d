"""This module defines every error class and the exit status that each means for a command.

| error | who made the mistake | exit status |
|---|---|---|
| `JobError`, `LayoutError` | the author of the job or of the command line | 2 |
| `Unsupported` | nobody: this strategy cannot run this job here | 2 |
| `ModuleNotFoundError` | the machine lacks a package | 3 |
| `NoRoom` | the machine lacks room, or the right, to write in a folder | 3 |
| `RunError`, `StartError`, `PeerFailed`, `RunFailed` | the run itself failed | 1 |
| `CheckFailed` | the job's own code raised while it was tried out | 1 |
| `Stopped` | nobody: a signal told the run to stop | 143; 130 by Ctrl-C |

The module needs no torch."""

import contextlib
import dataclasses
import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from ..layout import LayoutError
from ..records import Kind
from .shown import LONGEST_LINE, on_one_line
from .traces import at_users_line, is_raised_by, sent_message, text_of, users_line

# What the system says of a disk that is full, and of one that may not be written to.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_NO_RIGHT = {errno.EACCES, errno.EPERM}
NO_ROOM = "cannot be written to: "  # in the words of `NoRoom`

LONGEST = 300  # characters of a message of a user's code that are shown


class JobError(ValueError):
    """Says in one line, for the author, what is wrong in the job or the command line."""


class Refused(JobError):
    """Says in one line why a run does not begin in a folder, which stays as it is."""


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


class NoRoom(RuntimeError):
    """Says that a folder cannot be written to, in the system's words."""


class Stopped(SystemExit):
    """Ends a run that a signal told to stop, once its state is saved; the message says which step.

    It is a SystemExit, so that no `except Exception` of a user's code takes it for an error of its
    own, and so that a script that a launcher started leaves with the same status. number: of the
    signal. agreed: all ranks raise it at the same place."""

    def __init__(self, message: str, number: int = signal.SIGTERM, agreed: bool = False) -> None:
        super().__init__(message)
        self.code = 128 + (number if number == signal.SIGINT else signal.SIGTERM)
        self.number, self.agreed, self.told = number, agreed, False

    def tell(self, more: str = "") -> None:
        """Print the message as one line on stderr, with `more` behind it, unless that is done."""
        if not self.told:
            print(on_one_line(f"hybrid: {self}{more}"), file=sys.stderr, flush=True)
        self.told = True


@dataclasses.dataclass(frozen=True)
class Failure:
    """Holds the first cause of a failed run.

    `details` is a traceback or the end of a log; `kind` is `job` (a mistake in the job),
    `unsupported`, `room` (the folder cannot be written to), `stopped` (by a signal, the state is
    saved) or `error` (an error of the run)."""

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
    if isinstance(error, NoRoom):
        return "room"
    if isinstance(error, Stopped):
        return "stopped"
    return "job" if isinstance(error, (JobError, LayoutError)) else "error"


def exit_status(error: BaseException) -> int | None:
    """Return the status of a command that ends so, or None if the error needs a traceback."""
    kind = error.failure.kind if isinstance(error, RunFailed) else kind_of(error)
    if kind == "stopped":
        return 128 + signal.SIGTERM
    if kind != "error":
        return 3 if kind == "room" else 2
    if isinstance(error, RunFailed):
        return 1
    if isinstance(error, ModuleNotFoundError) and error.name != "hybrid":
        return 3
    return 1 if isinstance(error, (PeerFailed, CheckFailed)) else None


def is_our_exit(error: BaseException) -> bool:
    """Tell whether this package ends the program so, as a signal's handler does."""
    return isinstance(error, SystemExit) and (isinstance(error, Stopped) or is_raised_by(error))


def is_users_exit(error: BaseException) -> bool:
    """Tell whether the user's code called `sys.exit` or the like."""
    exits = isinstance(error, SystemExit) and not is_our_exit(error)
    return exits and bool(users_line(error))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class name if it has no message.

    Where the user's own code raised it, its line stands behind: "..., at my_model.py:12"."""
    if sent := sent_message(error):
        return sent + at_users_line(error)
    said = (text_of(error).splitlines() or [type(error).__name__])[0]
    return _cut(said, LONGEST_LINE) + at_users_line(error)


def tell_error(error: BaseException) -> str:
    """Return an error of a user's code in one line: its class, the message, and the user's line.

    The toolkit's own errors are messages to the user, without a class. Of a group, the first error
    in it is told too."""
    if isinstance(error, SystemExit):
        return f"SystemExit: it ends the program, with {_told_status(error)}{at_users_line(error)}"
    kind, said = type(error).__name__, sent_message(error)
    said = said or " ".join((text_of(error).splitlines() or [""])[0].split())
    said = _cut(said, LONGEST)
    if isinstance(error, BaseExceptionGroup):
        first = error.exceptions[0]
        said += f": {type(first).__name__}: {_cut(' '.join(text_of(first).split()), LONGEST)}"
    if isinstance(error, (JobError, RunError)):
        return said + at_users_line(error)
    return (f"{kind}: {said}" if said else kind) + at_users_line(error)


def _told_status(error: SystemExit) -> str:
    code = 0 if error.code is None else error.code
    if isinstance(code, int):
        return f"status {code}"
    return f"status 1: {_cut(' '.join(text_of(error).split()), LONGEST)}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


@contextlib.contextmanager
def needs_room(folder: Path | str | None) -> Iterator[None]:
    """Raise NoRoom in place of an error which says that nothing can be written in `folder`."""
    try:
        yield
    except Exception as error:
        if folder is not None and (words := _no_room(error, Path(folder))):
            raise NoRoom(f"{folder}: {NO_ROOM}{words}") from error
        raise


def _no_room(error: Exception, folder: Path) -> str:
    """Return the system's words of a disk that is full or may not be written to, else nothing.

    The file in `folder` stands behind them, where the error names one. An error that names a file
    elsewhere is not of `folder`, nor one of the user's own writing."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM | _NO_RIGHT:
        words, file = error.strerror or "", error.filename
        if not isinstance(file, (str, Path)):
            return words if error.errno in _NO_ROOM and not users_line(error) else ""
        inside = Path(os.path.relpath(file, folder))
        if inside.name and ".." not in inside.parts:
            return f"{words} ({inside})"
        return words if _is_near(Path(file), folder) else ""
    # As the libraries in Rust say it: safetensors.
    return os.strerror(errno.ENOSPC) if "(os error 28)" in str(error) else ""


def _is_near(path: Path, folder: Path) -> bool:
    """Tell whether a path is in a folder, or is one of those in which the folder would be made."""
    path, folder = path.absolute(), folder.absolute()
    return path.is_relative_to(folder) or folder.is_relative_to(path)
