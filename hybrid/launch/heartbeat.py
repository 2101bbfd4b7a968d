"""This module lets ranks tell one another that they live, what they do, and why one failed.

All of it goes through the store where the ranks met, so it needs no working collective. A rank that
fails reports why (`report`). Its peers, whose collectives then break or time out, ask for that
(`first_cause`) and end with this cause instead of their own error. A rank that was killed, stopped
or cut off cannot report; its peers notice that its signs of life have ceased. One that lives, but
does not come, is found by what all ranks say of themselves (`hybrid.launch.blame`)."""

import contextlib
import dataclasses
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from ..job.traces import OWN_PACKAGE, is_users, show_file
from .blame import ENDED, Cause, Sign, find_cause
from .bounded import run_within
from .placement import Placement
from .stall import LOOK_S, SHARE, StallWatch
from .stopping import STOPPED, TOLD_TO_END, give_up, told
from .waiting import num_waits, waits_for

T = TypeVar("T")
PERIOD_S = 1.0  # between signs of life
QUIET_BEATS = 5  # of our own, in which another rank gives none
PATIENCE_S = 2.0  # for another rank's report of a failure
LOST_MEETING = "gone or cut off, and with it the meeting point of the run"
_CAUSE = "hybrid/cause"
# Functions around a blocking call, which say nothing of where it stands.
_WRAPPERS = ("/launch/blocking_calls.py", "/launch/waiting.py", "torch/distributed/c10d_logger.py")


@dataclasses.dataclass
class Doing:
    """Holds what a rank is doing: in words, its step (-1: none), the collectives it has begun."""

    words: str
    step: int = -1
    begun: int = 0


class Heartbeat:
    """Writes this rank's signs of life to the store from now until `stop`.

    doing: returns what the rank is doing. timeout_s: how long it waits for others, which may
    change. logs: the folder for what this rank thinks of the others while it waits."""

    def __init__(
        self,
        placement: Placement,
        doing: Callable[[], Doing],
        timeout_s: float,
        logs: Path | None = None,
    ) -> None:
        store: Any = placement.store
        self.store, self.doing = store.clone(), doing
        self.rank, self.world_size = placement.rank, placement.world_size
        self.host = placement.host
        self.timeout_s = timeout_s
        self.watch = StallWatch(
            self.rank, SHARE * timeout_s, logs and logs / f"rank{self.rank}.waits.json"
        )
        self._failed_at: str | None = None  # the line where this rank failed, once it has
        self._left = ""
        self._stopped, self._woken = False, threading.Event()
        self._beats = 0
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self, left: str = ENDED) -> None:
        """Stop the signs of life; the last one says how this rank has left."""
        self._left, self._stopped = left, True
        self._woken.set()
        self._thread.join(PERIOD_S)

    def fails(self, line: str) -> None:
        """Say that this rank fails, where, and that it asks for the cause: it is not waited for."""
        self._failed_at = line
        self._woken.set()

    def report(self, message: str, line: str = "") -> None:
        """Report why this rank fails, and on which line; the first report is kept."""
        cause = Cause(self.rank, self.host, message, self.doing().words, line)
        word = json.dumps(dataclasses.asdict(cause))
        _bounded(lambda: self.store.compare_set(_CAUSE, "", word), None)

    def first_cause(self) -> Cause | None:
        """Return the failure that this rank's follows from, or None if no other rank is to blame.

        For a rank that lost a peer or waited in vain; it takes a few seconds."""
        return _bounded(self._ask, Cause(0, "its host", LOST_MEETING, "out of sight"))

    def failed_elsewhere(self) -> Cause | None:
        """Return the failure that another rank has reported by now, if one has.

        For a rank that was told to end: one that was told so too has not failed."""
        return _bounded(self._failed_elsewhere, None)

    def await_others(self, seconds: float) -> None:
        """Wait until all ranks that live have left too, for `seconds` at most.

        For the rank that holds the store, which the others ask for the cause."""
        deadline = time.monotonic() + seconds
        first = _bounded(self._signs, None)
        while first and time.monotonic() < deadline:
            signs = _bounded(self._signs, None)
            if not signs or all(s.left for r, s in enumerate(signs) if r != self.rank):
                return
            time.sleep(0.1)

    def _ask(self) -> Cause | None:
        verdict = self.watch.verdict
        if reported := self._reported(0.0 if verdict else PATIENCE_S):
            return reported
        if verdict:
            return verdict
        before = self._signs()
        time.sleep(LOOK_S)
        return find_cause(before, self._signs(), self.rank)

    def _beat(self) -> None:
        signs, quiet = list[int](), 0
        while True:
            last = self._stopped
            self._woken.clear()
            try:
                doing = self.doing()
                self._sign(doing)
                if last:
                    return
                self.watch.patience_s = SHARE * self.timeout_s
                self.watch.look(self._progress(doing), self._signs)
                if told() and self._failed_at is None:
                    before, signs = signs, self._beats_of_others()
                    quiet = (
                        quiet + 1 if any(a == b for a, b in zip(before, signs, strict=False)) else 0
                    )
                    if quiet == QUIET_BEATS or self._failed_elsewhere():
                        give_up()
                        return
            except RuntimeError:
                return  # the store is gone, and the next collective will raise
            if not self._stopped:
                self._woken.wait(PERIOD_S)

    def _sign(self, doing: Doing) -> None:
        """Write a sign of life."""
        self._beats += 1
        line, waits = self._failed_at, "the cause of its failure"
        if line is None:
            line, waits = _line_of(threading.main_thread().ident), waits_for()
        rest = waits, doing.step, doing.begun, self._left
        sign = Sign(self._beats, self.host, doing.words, line, *rest)
        self.store.set(f"hybrid/alive/{self.rank}", json.dumps(dataclasses.asdict(sign)))

    def _progress(self, doing: Doing) -> Hashable:
        return doing.words, doing.begun, num_waits(), self._failed_at

    def _beats_of_others(self) -> list[int]:
        return [sign.beat for rank, sign in enumerate(self._signs()) if rank != self.rank]

    def _failed_elsewhere(self) -> Cause | None:
        cause = self._reported(0.0)
        none = cause is None or cause.message.startswith((STOPPED, TOLD_TO_END))
        return None if none else cause

    def _reported(self, patience_s: float) -> Cause | None:
        deadline = time.monotonic() + patience_s
        while not self.store.check([_CAUSE]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        cause = Cause(**json.loads(self.store.get(_CAUSE)))
        return None if cause.rank == self.rank else cause

    def _signs(self) -> list[Sign]:
        keys = [f"hybrid/alive/{rank}" for rank in range(self.world_size)]
        if self.store.check(keys):
            return [Sign(**json.loads(word)) for word in self.store.multi_get(keys)]
        return [
            Sign(**json.loads(self.store.get(k))) if self.store.check([k]) else Sign() for k in keys
        ]


def _bounded(ask: Callable[[], T | None], otherwise: T | None) -> T | None:
    """Return what `ask` returns, or `otherwise` where the store breaks or does not answer in time.

    A request to a host that is cut off would wait until TCP gives up, a quarter of an hour."""
    answers: list[T | None] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # torch's store errors
            answers.append(ask())

    if not run_within(2 * PATIENCE_S + 4 * PERIOD_S, work):
        work()
    return answers[0] if answers else otherwise


def _line_of(thread: int | None) -> str:
    """Return the line that a thread executes, as FILE:LINE.

    It is the innermost one of the user's code which this package has called, if there is one."""
    return pick_line(_frames(sys._current_frames().get(thread or 0))) or "no line"


def _frames(frame: FrameType | None) -> Iterator[tuple[str, int]]:
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def pick_line(frames: Iterable[tuple[str, int]]) -> str:
    """Return the one of these lines, the innermost first, that says most; empty if there is none.

    It is the user's innermost one which this package has called, else the innermost of all."""
    innermost = ""
    for file, number in frames:
        if not file.endswith(_WRAPPERS):
            line = f"{show_file(file)}:{number}"
            if _is_users(file):
                return line
            innermost = innermost or line
            if file.startswith(OWN_PACKAGE):
                break
    return innermost


_is_users = functools.cache(is_users)  # it asks the file system
