"""This module records why each rank failed.

A rank keeps a `RankStatus`: what it is doing, in words. If it fails, `leave_error` writes why to
`OUT/logs/rankN.error.json` and tells the other ranks. `hybrid.launch.first_cause` reads these
files. The module needs no torch."""

import contextlib
import dataclasses
import faulthandler
import mmap
import re
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import records
from ..job.errors import Stopped, kind_of, needs_room
from ..job.schema import Job
from ..job.shown import on_one_line
from ..job.traces import (
    at_users_line,
    innermost_line,
    is_raised_by,
    sent_message,
    users_line,
)
from ..records.whole import new_file
from .blame import ENDED, FAILED, Cause
from .farewell import note_failure
from .heartbeat import Doing, Heartbeat
from .lost_peers import is_mismatch, is_peer_loss
from .placement import Placement
from .stopping import TOLD_TO_END

OUT_OF_MEMORY = "out of memory"  # how what memory ran out for is described, and told again
_WIDTH = 240  # bytes in `logs/rankN.where`
MEETING = "meeting the other ranks"
FAREWELL_S = 8.0  # in which the other ranks may ask rank 0's store for the cause
HAS_ENDED = "the run has ended"  # what a rank does once all of its work is done
CPU_ALLOCATOR = "DefaultCPUAllocator"  # in the RuntimeError that torch raises on a full host


class RankStatus:
    """Says what this rank is doing and, if it fails, why.

    `doing` is in words. It is also written to `logs/rankN.where`, which is still there after the
    rank was killed. `parameters`: trained parameters of the whole model; `held`: how many of them
    this rank has (None: not known yet). `peers`: how this rank hears of the others."""

    def __init__(self, job: Job, placement: Placement, logs: Path | None = None) -> None:
        self.job, self.placement, self.logs = job, placement, logs
        self.parameters: int | None = None
        self.held: int | None = None
        self.peers: Heartbeat | None = None
        self.step = -1  # the last one that began; -1: none
        self.failed = False
        self.follows = False  # its failure follows from another rank's
        self._shown: mmap.mmap | None = None  # the file, written without a system call
        if logs:
            name = f"rank{placement.rank}.where"
            logs.mkdir(parents=True, exist_ok=True)
            with needs_room(logs.parent), new_file(logs / name) as file:
                # Not a hole: on a full disk the first write to a mapped hole ends the process.
                file.write(b" " * _WIDTH)
                file.flush()
                self._shown = mmap.mmap(file.fileno(), _WIDTH)
        if placement.launcher is not None and not faulthandler.is_enabled():
            faulthandler.enable(2)  # what a library's abort or a bad access ends says where it was
        self._seconds: float = job.launch.setup_timeout_s  # that it waits for others
        self.set("starting")

    def set(self, doing: str, step: int | None = None) -> None:
        """Set what this rank does from now on. step: the one that it begins."""
        self.doing = doing
        if step is not None:
            self.step = step
        if self._shown:
            # It covers the old text, also where a character takes several bytes.
            self._shown[:] = doing.encode()[:_WIDTH].ljust(_WIDTH)

    def start_heartbeat(self, placement: Placement) -> None:
        """Start to write signs of life to the store where the ranks met, if they did."""
        if placement.store is not None and placement.world_size > 1:
            self.peers = Heartbeat(placement, self._tell, self._seconds, self.logs)

    def hurry(self, in_step: bool) -> None:
        """Set how long this rank waits for others from now on: as in steps, or as in all else."""
        limits = self.job.launch
        seconds = limits.collective_timeout_s if in_step else limits.setup_timeout_s
        if seconds == self._seconds:
            return
        if process_group := sys.modules.get(f"{__package__}.process_group"):
            process_group.set_timeouts(seconds)
        self._seconds = seconds
        if self.peers:
            self.peers.timeout_s = seconds

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """Wait for others as long as in the setting up, while the context lasts."""
        before = self._seconds
        self.hurry(in_step=False)
        try:
            yield
        finally:
            self.hurry(in_step=before == self.job.launch.collective_timeout_s)

    def _tell(self) -> Doing:
        blocking_calls = sys.modules.get(f"{__package__}.blocking_calls")
        begun = blocking_calls.num_begun() if blocking_calls else 0
        return Doing(self.doing, self.step, begun)

    def end(self) -> None:
        """Say that this rank has done all of its work: it may leave with status 0 from now on."""
        self.set(HAS_ENDED)

    def close(self) -> None:
        """Stop the signs of life and close the status file."""
        if self.peers:
            self.peers.stop(FAILED if self.failed else ENDED)
            # The store ends with rank 0. Our own launcher reads files and does not need it.
            if self.follows and self.placement.rank == 0 and self.placement.under_foreign_launcher:
                self.peers.await_others(FAREWELL_S)
        if self._shown:
            self._shown.close()


def leave_error(error: BaseException, status: RankStatus) -> Cause | None:
    """Write why this rank failed, for `first_cause`, and tell the other ranks.

    Returns the other rank's failure that this one follows from, if there is one. Where memory ran
    out, what is known of it is also added to the error's notes, for launchers that print them."""
    message, kind = _first_words(error), kind_of(error)
    lost = is_peer_loss(message) and not _is_of_users_own(error)
    line, status.failed = "", not getattr(error, "agreed", False)
    if status.placement.launcher is not None and status.failed:
        note_failure()
    whole = f"{message} ({status.doing})"
    if kind != "error":
        message = whole = str(error)
    elif is_out_of_memory(error):
        message = whole = describe_out_of_memory(error, status)
        error.add_note(message)
    elif not lost:
        line = _users_line(error, status)
    cause = _ask_peers(status.peers, error, lost, message) if status.peers else None
    if status.peers and cause is None and not lost:
        status.peers.report(message, line)
    status.follows = cause is not None
    if kind == "error" and status.placement.under_foreign_launcher:
        _print_cause(whole + line, cause, status.placement)
    if status.logs:
        what: dict[str, Any] = {
            "time": time.time(),
            "host": status.placement.host,
            "message": whole + line,
            "details": _trace(error),
            "kind": kind,
            "effect": lost,
            "at": users_line(error) or innermost_line(error),
            "cause": dataclasses.asdict(cause) if cause else None,
        }
        try:
            records.write(what, status.logs / f"rank{status.placement.rank}.error.json")
        except OSError:  # such as a full disk: the file of `set` has had its room before
            status.set(message[-_WIDTH:])
    return cause


def _ask_peers(peers: Heartbeat, error: BaseException, lost: bool, message: str) -> Cause | None:
    """Tell the other ranks that this one fails; return whose fault it is, if it is another's."""
    peers.fails(users_line(error) or innermost_line(error))
    if lost or is_mismatch(message):
        return peers.first_cause()
    return peers.failed_elsewhere() if message == TOLD_TO_END else None


def _is_of_users_own(error: BaseException) -> bool:
    """Tell whether the user's code lost a connection of its own, such as to a server of data."""
    own = isinstance(error, OSError) and bool(users_line(error))  # torch's are RuntimeErrors
    return own and not is_raised_by(error, "torch", "deepspeed", "accelerate")


def _first_words(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    if isinstance(error, SystemExit):
        return str(error) if isinstance(error, Stopped) else TOLD_TO_END
    if sent := sent_message(error):
        return sent
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _users_line(error: BaseException, status: RankStatus) -> str:
    """Say on which line of the user's code an error was raised and in which log it stands."""
    line = at_users_line(error)
    if users_line(error) and status.logs and status.placement.launcher:
        line += f" (log: {status.logs / f'rank{status.placement.rank}.log'})"
    return line


def _print_cause(message: str, cause: Cause | None, here: Placement) -> None:
    """Print the cause in one line before any traceback, since launchers mix their ranks' output.

    `hybrid`'s own launcher reads the file instead, and the command prints a mistake in the job."""
    line = f"hybrid: rank {here.rank} on {here.host}"
    if cause:
        line += f" ends, because of rank {cause.rank} on {cause.host}"
        message = f"{cause.message} ({cause.where}){cause.line}"
    print(on_one_line(f"{line}: {message}"), file=sys.stderr, flush=True)


def _trace(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except MemoryError:  # a traceback reads source files; the message matters more
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is Python's or torch's for a lack of memory, on a GPU or a CPU.

    It is told by name, since a rank may fail before it imports torch."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or CPU_ALLOCATOR in str(error)


def lack_of_memory(error: BaseException) -> str | None:
    """Return what `leave_error` has noted of a lack of memory, None where it was none."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note.startswith(OUT_OF_MEMORY)), None)


def is_for_memory(reason: str) -> bool:
    """Tell whether the reason of a failed run is one that `describe_out_of_memory` wrote."""
    return f": {OUT_OF_MEMORY} " in reason


def describe_out_of_memory(error: BaseException, status: RankStatus) -> str:
    """Say in one line where memory ran out, what training needs, the limits, what needs less."""
    asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
    parts = [
        f"{OUT_OF_MEMORY} {status.doing}",
        f"could not allocate {asked[1]}" if asked else "",
        _needs(status),
        *_limits(error),
        "zero1 and zero2 hold less on a rank, fsdp, zero3, pipeline and 2d least, "
        "the less the more processes there are",
    ]
    return "; ".join(part for part in parts if part)


def _needs(status: RankStatus) -> str:
    """Say how much memory the parameters of this rank, or of the whole model, need."""
    if status.parameters is None:
        return ""
    counted = status.parameters if status.held is None else status.held
    whose = f"this rank holds {counted:,} of the model's {status.parameters:,} parameters"
    if status.held is None:
        whose = f"the model has {counted:,} parameters"
    elif status.held == status.parameters:
        whose = f"this rank holds all {counted:,} parameters of the model"
    optimizer = status.job.optimizer
    if ":" in optimizer.name:
        takes = "with gradients they take 8 bytes each in fp32"
        more = f"the state of {optimizer.name} and activations come on top"
        return f"{whose}: {takes}, {_mib(counted * 8)}; {more}"
    # Numbers of 4 bytes in fp32: the parameter, its gradient, two moments or what momentum keeps.
    size = 16 if optimizer.name == "adamw" else 12 if optimizer.momentum else 8
    takes = f"with gradients and the state of {optimizer.name} they take {size} bytes each in fp32"
    return f"{whose}: {takes}, {_mib(counted * size)}, and activations come on top"


def _limits(error: BaseException) -> list[str]:
    """Return the GPU's memory by torch's message and this process's own limits (setrlimit(2))."""
    capacity = re.search(r"total capacity of ([\d.]+ \w+)", str(error))
    found = [f"the GPU has {capacity[1]}"] if capacity else []
    for name in ("RLIMIT_DATA", "RLIMIT_AS"):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            found.append(f"{name} allows this process {_mib(soft)} in all")
    return found


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
