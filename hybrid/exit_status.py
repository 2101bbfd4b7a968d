"""What an error means to whoever gave the command: a line, and an exit status. No torch."""

from __future__ import annotations

import os
import sys

from .config import JobError
from .launch import RunFailed
from .layout import LayoutError
from .rank import PeerFailed
from .strategies.base import Unsupported


def explain(error: Exception) -> tuple[str | None, int]:
    """What to say of an error that a command ended with, if anything, and the exit status; raises
    an error that only its traceback explains."""
    if isinstance(error, (JobError, LayoutError, Unsupported)):
        # All ranks of a launcher find the same mistake; one a host says it.
        quiet = os.environ.get("LOCAL_RANK", "0") != "0" and "HYBRID_PARENT" not in os.environ
        return None if quiet else str(error), 2
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
