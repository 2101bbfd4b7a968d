"""This module bounds how many processes a command starts on this host. It needs no torch."""

from typing import Any

from ..job.errors import JobError
from ..job.reading import show
from .threads import num_cores

PER_CORE = 64  # so many processes of one core do nothing but wait for one another


def most_processes() -> int:
    """Return how many processes a command may start here."""
    return PER_CORE * num_cores()


def check_processes(asked: Any, given: str) -> None:
    """Raise JobError, which begins with what was `given`, unless so many processes can start."""
    most, cores = most_processes(), num_cores()
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise JobError(f"{given}: {show(asked)} is no number of processes; valid: 1 to {most}")
    if asked > most:
        host = f"this host has {cores} {'core' if cores == 1 else 'cores'}"
        raise JobError(f"{given}: {show(asked)} processes, and {host}; valid: 1 to {most}")


def check_workers(workers: int, ranks: int) -> None:
    """Raise JobError unless each of the ranks on this host may start so many workers."""
    most = most_processes() // ranks
    if workers > most:
        each = "the process" if ranks == 1 else f"each of {ranks} ranks"
        raise JobError(
            f"data.workers = {show(workers)}: {each} would start so many processes, and this host "
            f"has {num_cores()} cores; valid: 0 to {most}"
        )
