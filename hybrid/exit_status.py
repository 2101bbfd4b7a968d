"""What an error means to whoever gave the command: a line, and an exit status. No torch."""

from __future__ import annotations

import sys

from . import launchers
from .config import JobError
from .launch import RunFailed
from .launchers import Ranks
from .layout import LayoutError
from .rank import PeerFailed
from .strategies.base import Unsupported


def explain(error: Exception) -> tuple[str | None, int]:
    """What to say of an error that a command ended with, if anything, and the exit status; raises
    an error that only its traceback explains."""
    if isinstance(error, (JobError, LayoutError, Unsupported)):
        return None if _is_said_by_another() else str(error), 2
    if isinstance(error, RunFailed) and error.failure.kind != "error":
        return error.failure.message, 2
    if isinstance(error, RunFailed):
        print(f"hybrid: {error}\n{error.failure.details}", file=sys.stderr)
        return None, 1
    if isinstance(error, ModuleNotFoundError) and error.name != "hybrid":
        return str(error), 3
    if isinstance(error, PeerFailed):
        return None, 1  # said by `leave_error`, which knows the first cause
    raise error


def _is_said_by_another() -> bool:
    """All ranks of a launcher find the same mistake; one a host says it, and under `hybrid` each,
    in its own log."""
    try:
        return launchers.name() not in (None, "hybrid") and Ranks.from_env().local_rank > 0
    except JobError:  # the mistake is the launcher's own
        return False
