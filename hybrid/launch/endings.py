"""This module says on stderr why a command ended, with which exit status, and what to do next.

It needs no torch."""

import sys
import traceback

from ..job.shown import cut_lines, on_one_line

PACKAGES = ("torch", "accelerate", "deepspeed")


def explain(error: Exception) -> int:
    """Print what an error means, unless another process prints it, and return the exit status.

    Raises the error again where only its traceback explains it."""
    from ..job.errors import PeerFailed, RunFailed, exit_status
    from .farewell import has_failed

    status = exit_status(error)
    if status is None:
        if has_failed():  # Python would take down what may hang before it ends
            traceback.print_exception(error)
            return 1
        raise error
    if isinstance(error, PeerFailed) or (status == 2 and _is_said_by_another_rank()):
        return status  # `leave_error` knows the first cause and has printed it
    if isinstance(error, RunFailed) and status != 1:
        return say(error.failure.message, status)
    if isinstance(error, RunFailed):
        tell(str(error))
        print(cut_lines(error.failure.details), file=sys.stderr)
        return status
    return say(str(error), status)


def explain_exit(error: SystemExit) -> int:
    """Return the status of a command that ends by `sys.exit`, which in the user's code is an error.

    A signal's handler ends it so too, with the status of the signal."""
    from ..job.errors import is_users_exit
    from ..job.traces import at_users_line

    if is_users_exit(error):
        text = f"sys.exit({error.code!r}) in the job's own code ended the command"
        return say(text + at_users_line(error), 1)
    return error.code if isinstance(error.code, int) else int(error.code is not None)


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
    tell(message)
    return status


def tell(message: str) -> None:
    """Print a message as one line on stderr, whatever is in it."""
    print(f"hybrid: {on_one_line(message)}", file=sys.stderr, flush=True)


def suggest(message: str) -> None:
    """Print on stderr what one may do next, after a command that ended well."""
    tell(f"next: {message}")


def versions() -> str:
    """Return this package's release and those of what it trains with, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("hybrid", *PACKAGES):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return f"{found[0]} ({', '.join(found[1:])})"
