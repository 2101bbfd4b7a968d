"""This module lets ranks tell one another that they live, what they do, and why one failed.

All of it goes through the store where the ranks met, so it needs no working collective. A rank that
fails reports why (`report`). Its peers, whose collectives then break or time out, ask for that
(`first_cause`) and end with this cause instead of their own error. A rank that was killed, stopped
or cut off cannot report; its peers notice that its signs of life have ceased."""

import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .placement import Placement
from .stopping import STOPPED, give_up, told

T = TypeVar("T")
PERIOD_S = 1.0  # between signs of life
QUIET_BEATS = 5  # of our own, in which another rank gives none
PATIENCE_S = 2.0  # for another rank's report of a failure
_CAUSE = "hybrid/cause"
# The files in which a rank waits for others: in a collective, in a backward pass that starts some,
# for the numbers of a step, for a checkpoint.
_WAITING = (
    *("torch/distributed/", "torch/autograd/", "deepspeed/comm/"),
    *("engines/step_queue.py", "checkpoint/writer.py"),
)
_ENDED = threading._shutdown.__code__  # type: ignore[attr-defined]
# Errors with these words say that a peer is gone or did not come: an effect, never the first cause.
PEER_LOSS_MESSAGES = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "Connection was likely closed",
    "Timed out waiting",
    "Application timeout caused pair closure",  # gloo: another collective had timed out
    "Connection refused",
    "did not start within",
    "gone or cut off, and with it the meeting point",  # `Heartbeat.first_cause`
)


def is_peer_loss(message: str) -> bool:
    """Tell whether an error says that another rank is gone or did not come.

    A rank that found nobody at the rendezvous is itself the one that did not come."""
    return "no meeting of ranks" not in message and any(
        words in message for words in PEER_LOSS_MESSAGES
    )


@dataclasses.dataclass(frozen=True)
class Cause:
    """Says which rank failed first by what this rank knows, why, and what it was doing.

    `line` says where in the user's code, if it was there: ", at FILE:LINE (log: ...)"."""

    rank: int
    host: str
    message: str
    where: str
    line: str = ""

    def describe(self) -> str:
        """Describe the failure in one line."""
        return f"rank {self.rank} on {self.host}: {self.message} ({self.where}){self.line}"


class Heartbeat:
    """Writes this rank's signs of life to the store from now until `stop`.

    `doing` returns what the rank is doing."""

    def __init__(self, placement: Placement, doing: Callable[[], str]) -> None:
        store: Any = placement.store
        self.store, self.doing = store.clone(), doing
        self.rank, self.world_size = placement.rank, placement.world_size
        self.host = placement.host
        self._stopped = threading.Event()
        self._beats = 0
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the signs of life."""
        self._stopped.set()
        self._thread.join(PERIOD_S)

    def report(self, message: str, line: str = "") -> None:
        """Report why this rank fails, and on which line; the first report is kept."""
        cause = Cause(self.rank, self.host, message, self.doing(), line)
        word = json.dumps(dataclasses.asdict(cause))
        _bounded(lambda: self.store.compare_set(_CAUSE, "", word), None)

    def first_cause(self) -> Cause | None:
        """Return the failure that this rank's follows from, or None if no other rank is to blame.

        For a rank that lost a peer or waited in vain; it takes a few seconds."""
        lost = "gone or cut off, and with it the meeting point of the run"
        return _bounded(
            lambda: self._reported() or self._silent_rank() or self._stuck_rank(),
            Cause(0, "its host", lost, "out of sight"),
        )

    def _beat(self) -> None:
        signs, quiet = list[int](), 0
        while True:
            self._beats += 1
            line, waits = _line_of(threading.main_thread().ident)
            sign = {"beat": self._beats, "host": self.host, "where": self.doing()}
            sign |= {"line": line, "waits": waits}
            try:
                self.store.set(f"hybrid/alive/{self.rank}", json.dumps(sign))
                if told():
                    before, signs = signs, self._beats_of_others()
                    quiet = (
                        quiet + 1 if any(a == b for a, b in zip(before, signs, strict=False)) else 0
                    )
                    if quiet == QUIET_BEATS or self._another_failed():
                        give_up()
                        return
            except RuntimeError:
                return  # the store is gone, and the next collective will raise
            if self._stopped.wait(PERIOD_S):
                return

    def _beats_of_others(self) -> list[int]:
        return [sign["beat"] for rank, sign in enumerate(self._signs()) if rank != self.rank]

    def _another_failed(self) -> bool:
        """Tell whether another rank has reported that it fails, and was not told to stop."""
        if not self.store.check([_CAUSE]):
            return False
        cause = Cause(**json.loads(self.store.get(_CAUSE)))
        return cause.rank != self.rank and not cause.message.startswith(STOPPED)

    def _reported(self) -> Cause | None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.store.check([_CAUSE]):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.05)
        cause = Cause(**json.loads(self.store.get(_CAUSE)))
        return None if cause.rank == self.rank else cause

    def _signs(self) -> list[dict[str, Any]]:
        keys = [f"hybrid/alive/{rank}" for rank in range(self.world_size)]
        none = {"beat": 0, "host": "its host", "where": "starting", "line": "", "waits": False}
        return [json.loads(self.store.get(k)) if self.store.check([k]) else none for k in keys]

    def _silent_rank(self) -> Cause | None:
        """Find a rank whose signs of life have ceased."""
        before = self._signs()
        time.sleep(3 * PERIOD_S)
        for rank, (old, new) in enumerate(zip(before, self._signs(), strict=True)):
            if old["beat"] == new["beat"] and rank != self.rank:
                message = "no sign of life: killed, stopped or cut off"
                return Cause(rank, new["host"], message, new["where"])
        return None

    def _stuck_rank(self) -> Cause | None:
        """Find a rank that lives but does not wait for others as the rest do."""
        for rank, sign in enumerate(self._signs()):
            if rank != self.rank and not sign["waits"]:
                message = f"it did not join the others, and is at {sign['line']}"
                return Cause(rank, sign["host"], message, sign["where"])
        return None


def _bounded(ask: Callable[[], T | None], otherwise: T | None) -> T | None:
    """Return what `ask` returns, or `otherwise` where the store breaks or does not answer in time.

    A request to a host that is cut off would wait until TCP gives up, a quarter of an hour."""
    answers: list[T | None] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # torch's store errors
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # memory has run out, and a thread's stack finds no room
        work()
    else:
        thread.join(2 * PATIENCE_S + 4 * PERIOD_S)
    return answers[0] if answers else otherwise


def _line_of(thread: int | None) -> tuple[str, bool]:
    """Return the line that a thread executes, as FILE:LINE FUNCTION, and whether it waits there.

    A rank that has waited in vain asks for the cause, in a function of this file further up, and
    one that has ended waits for its threads."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "no line", False
    line = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
    waits = any(words in line for words in _WAITING)
    while frame and not waits:
        waits = frame.f_code.co_filename == __file__ or frame.f_code is _ENDED
        frame = frame.f_back
    return line, waits
