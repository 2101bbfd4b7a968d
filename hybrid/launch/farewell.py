"""This module ends a rank that has failed, so that it never waits for a peer any more.

Destroying gloo's groups waits for operations that cannot end, until they time out; NCCL's waits for
kernels. So the groups of a failed rank are aborted and kept, and the process ends without taking
anything down. torch is imported only where it is there already."""

import _thread
import atexit
import contextlib
import os
import sys
from typing import Any, NoReturn

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


def _within(seconds: float, work: Any) -> None:
    """Do something that may hang, and go on after `seconds` if it does.

    Where memory has run out, a new thread may end before it begins, which `threading.Thread.start`
    would wait for without an end."""
    done = _thread.allocate_lock()
    done.acquire()

    def quietly() -> None:
        try:
            with contextlib.suppress(Exception):
                work()
        finally:
            done.release()

    try:
        _thread.start_new_thread(quietly, ())
    except (RuntimeError, MemoryError):  # no room for a thread
        return
    done.acquire(timeout=seconds)
