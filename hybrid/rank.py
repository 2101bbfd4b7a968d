"""What a rank says of itself: where it is, what it died of, and what of its memory."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from . import launchers
from .config import Job, JobError
from .launchers import Ranks
from .layout import LayoutError
from .liveness import Cause, Liveness, is_effect
from .records import Kind
from .strategies.base import Unsupported

_WIDTH = 80  # characters of what a rank is about
CPU_ALLOCATOR = "DefaultCPUAllocator"  # in the RuntimeError of torch when a host has no memory


class PeerFailed(RuntimeError):
    """This rank ends because of another one."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(f"rank {cause.rank} on {cause.host}: {cause.message} ({cause.where})")


class Whereabouts:
    """What a rank is about: `doing`, in words; trained `parameters` of the whole model, and `held`,
    how many of them this rank has (None: not known yet). `peers`: how it hears of other ranks.
    `doing` also stands in `logs/rankN.where`, for when the rank cannot say it any more."""

    def __init__(self, job: Job, logs: Path | None = None) -> None:
        self.job, self.logs = job, logs
        self.rank = Ranks.from_env().rank
        self.parameters: int | None = None
        self.held: int | None = None
        self.peers: Liveness | None = None
        self._file = -1
        if logs:
            logs.mkdir(parents=True, exist_ok=True)
            self._file = os.open(logs / f"rank{self.rank}.where", os.O_CREAT | os.O_WRONLY)
        self.move("starting")

    def move(self, doing: str) -> None:
        """Be about something else."""
        self.doing = doing
        if self._file >= 0:
            os.pwrite(self._file, f"{doing:{_WIDTH}}"[:_WIDTH].encode(), 0)  # of one width: whole

    def close(self) -> None:
        """Give no more signs."""
        if self.peers:
            self.peers.stop()
        if self._file >= 0:
            os.close(self._file)


def logs_folder(out: Path | None) -> Path | None:
    """Where this rank leaves word: where `hybrid.launch` looks, or beside its results."""
    given = os.environ.get("HYBRID_LOGS")
    return Path(given) if given else out / "logs" if out else None


def leave_error(error: BaseException, at: Whereabouts) -> Cause | None:
    """Write what this rank died of, for `hybrid.launch.first_cause`, and tell the other ranks.
    Returns what it follows from, where that is another rank's failure. What is known of a lack of
    memory goes to the error's notes as well, for launchers that print it."""
    message, kind = ": ".join([type(error).__name__, *str(error).splitlines()[:1]]), kind_of(error)
    if isinstance(error, SystemExit):
        message = "was told to end, by SIGTERM"
    whole = f"{message} ({at.doing})"
    if kind != "error":
        message = whole = str(error)
    elif is_out_of_memory(error):
        message = whole = describe_out_of_memory(error, at)
        error.add_note(message)
    cause = None
    if at.peers and is_effect(message):
        cause = at.peers.first_cause()
    elif at.peers:
        at.peers.report(message)
    _say(whole, cause, at, kind)
    what: dict[str, Any] = {
        "time": time.time(),
        "host": socket.gethostname(),
        "message": whole,
        "details": _trace(error),
        "kind": kind,
        "cause": dataclasses.asdict(cause) if cause else None,
    }
    if at.logs:
        path = at.logs / f"rank{at.rank}.error.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(what))
        os.replace(part, path)
    return cause


def kind_of(error: BaseException) -> Kind:
    """Whose fault an error is."""
    if isinstance(error, Unsupported):
        return "unsupported"
    return "job" if isinstance(error, (JobError, LayoutError)) else "error"


def _say(message: str, cause: Cause | None, at: Whereabouts, kind: Kind) -> None:
    """The cause in one line, before any traceback, where a launcher mixes what its ranks print.
    `hybrid` itself reads the file; a mistake in the job is its reader's to print."""
    if launchers.name() in (None, "hybrid") or kind != "error":
        return
    here = f"hybrid: rank {at.rank} on {socket.gethostname()}"
    if cause:
        here += f" ends, because of rank {cause.rank} on {cause.host}"
        message = f"{cause.message} ({cause.where})"
    print(f"{here}: {message}", file=sys.stderr, flush=True)


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


def describe_out_of_memory(error: BaseException, at: Whereabouts) -> str:
    """One line: where memory ran out, what the model's training takes, what limit is known, and
    what takes less."""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    parts = [
        f"out of memory {at.doing}",
        f"could not allocate {asked[1]}" if asked else "",
        _needs(at),
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
