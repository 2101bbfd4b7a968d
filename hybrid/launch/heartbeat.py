"""What ranks tell one another beside their collectives: that they live, where they are, and what a
rank died of. It goes over the store where they met, so it needs no collective to work.

A rank that fails says why (`report`); its peers, whose collectives break or time out, ask
(`first_cause`) and end with that word instead of their own. A rank that cannot speak any more,
killed, stopped or cut off, is known by its signs of life ceasing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .placement import Placement

T = TypeVar("T")
PERIOD_S = 1.0  # between signs of life
PATIENCE_S = 2.0  # for another rank's word about a failure
_CAUSE = "hybrid/cause"
# Where a rank is that waits for others: in a collective, in a backward pass that makes some, or in
# this file, when it has waited in vain.
_WAITING = (
    "torch/distributed/",
    "torch/autograd/",
    "deepspeed/comm/",
    "hybrid/launch/heartbeat.py",
)
# How a rank words that a peer went away, or did not come: an effect, never the first cause.
PEER_LOSS_MESSAGES = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "Connection was likely closed",
    "Timed out waiting",
    "Connection refused",
    "did not start within",
)


def is_peer_loss(message: str) -> bool:
    """Whether an error says that another rank is gone or did not come. One that found nobody at the
    meeting point is itself the one that did not come."""
    return "no meeting of ranks" not in message and any(
        words in message for words in PEER_LOSS_MESSAGES
    )


@dataclasses.dataclass(frozen=True)
class Cause:
    """Which rank failed first, as far as this rank can tell, why, and what it was about."""

    rank: int
    host: str
    message: str
    where: str

    def describe(self) -> str:
        """The failure in one line."""
        return f"rank {self.rank} on {self.host}: {self.message} ({self.where})"


class Heartbeat:
    """The signs of life of this rank, from now until `stop`. `doing` returns what it is doing."""

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
        """Give no more signs."""
        self._stopped.set()
        self._thread.join(PERIOD_S)

    def report(self, message: str) -> None:
        """Say what this rank fails of; the first word of all ranks stands."""
        cause = Cause(self.rank, self.host, message, self.doing())
        word = json.dumps(dataclasses.asdict(cause))
        _bounded(lambda: self.store.compare_set(_CAUSE, "", word), None)

    def first_cause(self) -> Cause | None:
        """What a failure of this rank follows from, when it lost a peer or waited in vain; takes a
        few seconds. None where no other rank is to blame."""
        lost = "gone or cut off, and with it the meeting point of the run"
        return _bounded(
            lambda: self._reported() or self._silent_rank() or self._stuck_rank(),
            Cause(0, "its host", lost, "out of sight"),
        )

    def _beat(self) -> None:
        while True:
            self._beats += 1
            line = _line_of(threading.main_thread().ident)
            sign = {"beat": self._beats, "host": self.host, "where": self.doing(), "line": line}
            try:
                self.store.set(f"hybrid/alive/{self.rank}", json.dumps(sign))
            except RuntimeError:
                return  # the store is gone, and a collective will tell
            if self._stopped.wait(PERIOD_S):
                return

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
        none = {"beat": 0, "host": "its host", "where": "starting", "line": ""}
        return [json.loads(self.store.get(k)) if self.store.check([k]) else none for k in keys]

    def _silent_rank(self) -> Cause | None:
        """A rank whose signs have ceased."""
        before = self._signs()
        time.sleep(3 * PERIOD_S)
        for rank, (old, new) in enumerate(zip(before, self._signs(), strict=True)):
            if old["beat"] == new["beat"] and rank != self.rank:
                message = "no sign of life: killed, stopped or cut off"
                return Cause(rank, new["host"], message, new["where"])
        return None

    def _stuck_rank(self) -> Cause | None:
        """A rank that lives, and is not waiting for others as the rest are."""
        for rank, sign in enumerate(self._signs()):
            if rank != self.rank and not any(words in sign["line"] for words in _WAITING):
                message = f"it did not join the others, and is at {sign['line']}"
                return Cause(rank, sign["host"], message, sign["where"])
        return None


def _bounded(ask: Callable[[], T | None], otherwise: T | None) -> T | None:
    """What `ask` returns; `otherwise` where the store breaks, or does not answer: a request to a
    host that is cut off waits as long as TCP tries, a quarter of an hour."""
    answers: list[T | None] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # torch's store errors
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(2 * PATIENCE_S + 4 * PERIOD_S)
    return answers[0] if answers else otherwise


def _line_of(thread: int | None) -> str:
    """The line that a thread executes, as FILE:LINE FUNCTION."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "no line"
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
