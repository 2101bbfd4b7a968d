"""This module says on stderr why a command ended, and with which exit status. It needs no torch."""

import sys


def explain(error: Exception) -> int:
    """Print what an error means, unless another process prints it, and return the exit status.

    Raises the error again where only its traceback explains it."""
    from ..job.errors import PeerFailed, RunFailed, exit_status

    status = exit_status(error)
    if status is None:
        raise error
    if isinstance(error, PeerFailed) or (status == 2 and _is_said_by_another_rank()):
        return status  # `leave_error` knows the first cause and has printed it
    if isinstance(error, RunFailed) and status != 1:
        return say(error.failure.message, status)
    if isinstance(error, RunFailed):
        print(f"hybrid: {error}\n{error.failure.details}", file=sys.stderr)
        return status
    return say(str(error), status)


def _is_said_by_another_rank() -> bool:
    """Tell whether another rank prints this mistake, since the first rank of each host does."""
    from ..job.errors import JobError
    from .placement import find_placement

    try:
        here = find_placement("--parent" in sys.argv)
    except JobError:  # the mistake is the launcher's own
        return False
    return here.under_foreign_launcher and here.local_rank > 0


def say(message: str, status: int) -> int:
    """Print a message as one line on stderr, and return the status."""
    line = " ".join(message.split())
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"hybrid: {shown}", file=sys.stderr)
    return status
