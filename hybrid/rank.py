"""What a rank does for the process that started it: leaves its error, and ends with it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from .config import Job, JobError

CPU_ALLOCATOR = "DefaultCPUAllocator"  # in the RuntimeError of torch when a host has no memory


@dataclasses.dataclass
class Whereabouts:
    """What a rank is about, to be kept up to date: `doing` in words, trained `parameters` of the
    whole model, and `held`, how many of them this rank has (None: not known yet)."""

    job: Job
    doing: str = "building the model"
    parameters: int | None = None
    held: int | None = None


def leave_error(error: BaseException, at: Whereabouts | None = None) -> None:
    """Write what this rank died of, for `hybrid.launch.first_cause`. What is known of a lack of
    memory goes to the error's notes as well, for launchers that print it."""
    message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if isinstance(error, JobError):
        message = str(error)
    elif is_out_of_memory(error):
        message = describe_out_of_memory(error, at)
        error.add_note(message)
    folder, rank = os.environ.get("HYBRID_LOGS"), os.environ.get("RANK", "0")
    if not folder:
        return
    what: dict[str, Any] = {
        "time": time.time(),
        "message": message,
        "details": _trace(error),
        "is_job": isinstance(error, JobError),
    }
    path = Path(folder) / f"rank{rank}.error.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(what))
    os.replace(part, path)


def _trace(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except MemoryError:  # it reads source files; the message matters more
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's, on a GPU or a CPU, or Python's word for it. By name: a rank that
    fails before it imports torch has no need of it."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or CPU_ALLOCATOR in str(error)


def describe_out_of_memory(error: BaseException, at: Whereabouts | None = None) -> str:
    """One line: where memory ran out, what the model's training takes, what limit is known, and
    what takes less."""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    parts = [
        f"out of memory {at.doing}" if at else "out of memory",
        f"could not allocate {asked[1]}" if asked else "",
        _needs(at) if at else "",
        *_limits(error),
        "zero1 and zero2 hold less on a rank, fsdp, zero3, pipeline and 2d least, "
        "the less the more processes there are",
    ]
    return "; ".join(part for part in parts if part)


def _needs(at: Whereabouts) -> str:
    """What the parameters of this rank, or of the whole model, take."""
    if at.parameters is None:
        return ""
    counted = at.parameters if at.held is None else at.held
    whose = f"this rank holds {counted:,} of the model's {at.parameters:,} parameters"
    if at.held is None:
        whose = f"the model has {counted:,} parameters"
    elif at.held == at.parameters:
        whose = f"this rank holds all {counted:,} parameters of the model"
    optimizer = at.job.optimizer
    # fp32 numbers of 4 bytes: the parameter, its gradient, two moments or what momentum keeps.
    size = 16 if optimizer.name == "adamw" else 12 if optimizer.momentum else 8
    takes = f"with gradients and the state of {optimizer.name} they take {size} bytes each in fp32"
    return f"{whose}: {takes}, {_mib(counted * size)}, and activations come on top"


def _limits(error: BaseException) -> list[str]:
    """What a GPU has, by torch's message, and this process's limits that are set (setrlimit(2))."""
    capacity = re.search(r"total capacity of ([\d.]+ \w+)", str(error))
    found = [f"the GPU has {capacity[1]}"] if capacity else []
    if sys.platform != "win32":
        import resource

        for name in ("RLIMIT_DATA", "RLIMIT_AS"):
            soft, _ = resource.getrlimit(getattr(resource, name))
            if soft != resource.RLIM_INFINITY:
                found.append(f"{name} allows this process {_mib(soft)} in all")
    return found


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def end_with_parent() -> None:
    """Have the kernel end this rank when the process that started it is gone (Linux; nothing
    elsewhere). A launcher that is killed leaves no one to do it."""
    parent = os.environ.get("HYBRID_PARENT")
    if parent is None or sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(1)
