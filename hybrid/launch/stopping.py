"""This module has a run save and leave where a signal tells it to stop. It needs no torch.

A rank enters `StopSignals`, and `hybrid` itself `PassedOn` while its ranks run; both only for a job
that saves its state, [checkpoint].every. A handler sets a number and no more while steps are made:
the number travels to all ranks beside a step's other numbers, so that all save after the same one
(`hybrid.engines.step_queue`). At other times nothing is worth waiting for, and the rank ends."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ..job.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher passes on what a terminal or SLURM has sent to each of its processes already.
SAME_S = 1.0
STOPPED = "stopped by "  # how the reason of a run that was stopped begins
TOLD_TO_END = "was told to end, by SIGTERM"  # the reason of a rank that has not failed itself
SCONTROL_S = 30


class _Told:
    """Holds which signal told this process to stop; signals are the whole process's."""

    number = 0
    gave_up = False  # there is nothing left to wait for
    saves = False  # a signal has this rank save its state


def told() -> int:
    """Return the number of the signal that told this rank to stop, 0: none has."""
    return _Told.number


def saves_at_signals() -> bool:
    """Tell whether this rank saves its state when a signal tells it to stop."""
    return _Told.saves


def give_up() -> None:
    """End this rank, which was told to stop, at once: another one has failed, and none can save."""
    _Told.gave_up = True
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def unbroken(needed: bool) -> Iterator[None]:
    """Let a rank that fails say why, though its launcher ends it for another rank's failure.

    A launcher's SIGTERM may come before the rank knows why it has lost its peers. It is dropped,
    since the rank ends anyway; one that comes `SAME_S` later ends the rank at once. A handler that
    a caller has set stays, and so does that of `StopSignals`."""
    before = signal.getsignal(signal.SIGTERM)
    here = threading.current_thread() is threading.main_thread()
    if not (needed and here and before in (signal.SIG_DFL, end_now)):
        yield
        return
    came: list[float] = []

    def take(number: int, frame: FrameType | None) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > SAME_S:
            os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, take)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_now(number: int, frame: FrameType | None = None) -> None:
    """Handle a signal: end this process, with what is to be done then."""
    sys.exit(128 + signal.SIGTERM)


class _Handlers:
    """Handles the signals while it is entered, in place of Python's own or `hybrid`'s handlers.

    One that a caller has set, or that ignores a signal, stays."""

    def __enter__(self) -> Any:
        self._before: dict[int, Any] = {}
        _Told.number, _Told.gave_up = 0, False
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                ours = (signal.SIG_DFL, signal.default_int_handler, end_now)
                if (found := signal.getsignal(number)) in ours:
                    self._before[number] = found
                    signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _Told.number = 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopSignals(_Handlers):
    """Notes that this rank was told to stop, while it is entered.

    saved: the newest step that is saved. waits: a signal is noted and does not end the rank.
    leaves: the rank ends anyway. A second signal ends it at once, unless it is the same one: it
    came within `SAME_S`."""

    def __init__(self) -> None:
        self.saved: int | None = None
        self.waits = self.leaves = False
        self._since = 0.0

    def __enter__(self) -> "StopSignals":
        _Told.saves = True
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        _Told.saves = False
        super().__exit__(*error)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not _Told.number:
            _Told.number, self._since = number, time.monotonic()
            if not self.waits and not self.leaves:
                raise self.stopped(number)
        elif _Told.gave_up or time.monotonic() - self._since > SAME_S:
            if self.leaves:
                os._exit(128 + signal.SIGTERM)
            sys.exit(128 + signal.SIGTERM)

    def act_at_once(self) -> None:
        """Let a signal end this rank from now on, also one that has come."""
        self.waits = False
        if _Told.number:
            raise self.stopped(_Told.number)

    def stopped(self, number: int, agreed: bool = False) -> Stopped:
        """Return the error that ends this rank. agreed: all ranks raise it at the same place."""
        name = signal.Signals(number).name
        what = "before the first step was saved"
        if self.saved is not None:
            what = f"after step {self.saved}, which is saved; --resume auto goes on"
        return Stopped(f"{STOPPED}{name} {what}", number, agreed)


class PassedOn(_Handlers):
    """Notes a signal that `hybrid` is to pass on to its ranks; a second one ends them at once.

    One that comes within `SAME_S` of the first is the same one: GNU timeout sends it to the process
    and to its group."""

    _since = 0.0

    def _take(self, number: int, frame: FrameType | None) -> None:
        if _Told.number:
            if time.monotonic() - self._since <= SAME_S:
                return
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            end_now(number)
        _Told.number, self._since = number, time.monotonic()


def requeue(error: Stopped) -> str:
    """Have SLURM run this job again where SIGUSR1 stopped it, and return the words for that."""
    job = os.environ.get("SLURM_JOB_ID")
    if error.number != signal.SIGUSR1 or not job:
        return ""
    try:
        words = ["scontrol", "requeue", job]
        subprocess.run(words, check=True, capture_output=True, text=True, timeout=SCONTROL_S)
    except (OSError, subprocess.SubprocessError) as failed:
        said = getattr(failed, "stderr", None) or str(failed)
        return f"; SLURM does not requeue job {job}: {' '.join(said.split())}"
    return f"; SLURM requeues job {job}"


def end_group(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """End a process that leads a group of its own, then what is left of the group.

    A launcher ends its ranks in `patience_s`; ranks whose launcher is killed end themselves."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
