"""This module ends a rank that has failed, so that it never waits for a peer any more.

Destroying gloo's groups waits for operations that cannot end, until they time out; NCCL's waits for
kernels. So the groups of a failed rank are aborted and kept, and the process ends without taking
anything down. torch is imported only where it is there already."""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from .bounded import run_within

PATIENCE_S = 5.0  # for what may hang: an abort of NCCL, functions that run at exit
_kept: list[Any] = []  # groups whose destructors would wait
_failed = [False]


def note_failure() -> None:
    """Note that this process is a rank that has failed: `leave` ends it at once."""
    _failed[0] = True


def begin() -> None:
    """Note that a command begins: what failed in this process before is not its failure."""
    _failed[0] = False


def has_failed() -> bool:
    """Tell whether this process is a rank that has failed."""
    return _failed[0]


def abandon_groups() -> None:
    """Leave the process groups of this process without waiting for anybody."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        return
    world = dist.distributed_c10d._world
    _kept.extend(world.pg_map)
    _within(PATIENCE_S, dist.distributed_c10d._abort_process_group)
    if deepspeed := sys.modules.get("deepspeed.comm.comm"):
        deepspeed.cdb = None  # type: ignore[attr-defined]  # it keeps the groups too


def leave(status: int) -> NoReturn:
    """End the process with this status; one that has failed ends at once, whatever hangs."""
    if not _failed[0]:
        sys.exit(status)
    _within(PATIENCE_S, atexit._run_exitfuncs)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _within(seconds: float, work: Callable[[], object]) -> None:
    """Do something that may hang or fail, and go on after `seconds`, or where it cannot be done."""

    def quietly() -> None:
        with contextlib.suppress(Exception):
            work()

    run_within(seconds, quietly)
