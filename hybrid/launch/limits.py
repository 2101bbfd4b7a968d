"""This module bounds how many processes a command starts on this host. It needs no torch."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from ..job.errors import JobError
from ..job.reading import show
from .threads import num_cores
from .variable_check import MOST_RANKS

PER_CORE = 64  # so many processes of one core do nothing but wait for one another
FILES_OF_A_RANK, FILES_PER_PEER = 24, 3  # ddp with 1 to 8 ranks over gloo ends early with fewer


def most_processes() -> int:
    """Return how many processes a command may start here."""
    return PER_CORE * num_cores()


def check_processes(asked: Any, given: str, here: bool = True) -> None:
    """Raise JobError, which begins with what was `given`, unless so many processes can start.

    here: on this host; otherwise a launcher starts them, wherever that is."""
    most, cores = most_processes() if here else MOST_RANKS, num_cores()
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 1:
        raise JobError(f"{given}: {show(asked)} is no number of processes; valid: 1 to {most}")
    if asked > most:
        host = f"this host has {cores} {'core' if cores == 1 else 'cores'}"
        why = f", and {host}" if here else ""
        raise JobError(f"{given}: {show(asked)} processes{why}; valid: 1 to {most}")
    if here:
        _check_open_files(asked, given)


def _check_open_files(ranks: int, given: str) -> None:
    """Raise JobError if a rank may surely not have as many files open as it needs (ulimit -n)."""
    if sys.platform == "win32":
        return
    from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit

    needed, limit = FILES_OF_A_RANK + FILES_PER_PEER * (ranks - 1), getrlimit(RLIMIT_NOFILE)[0]
    if limit != RLIM_INFINITY and limit < needed:
        raise JobError(
            f"{given}: a process of {ranks} has {needed} files open or more, and here it may have "
            f"{limit}; valid: `ulimit -n {max(64, 2 * needed)}` before the command"
        )


def check_workers(workers: int, ranks: int) -> None:
    """Raise JobError unless each of the ranks on this host may start so many workers."""
    most = most_processes() // ranks
    if workers > most:
        each = "the process" if ranks == 1 else f"each of {ranks} ranks"
        raise JobError(
            f"data.workers = {show(workers)}: {each} would start so many processes, and this host "
            f"has {num_cores()} cores; valid: 0 to {most}"
        )


def host_memory() -> int:
    """Return the bytes of memory that this host has, with what it swaps to."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        swap = re.search(r"^SwapTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        swap = None
    return memory + (int(swap[1]) << 10 if swap else 0)


def check_memory(needed: int, given: str) -> None:
    """Raise JobError, which begins with what was `given`, if this host has no `needed` bytes."""
    if needed > (has := host_memory()):
        raise JobError(f"{given}: {_gib(needed)}, and this host has {_gib(has)}; valid: less")


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
