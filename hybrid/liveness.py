"""What ranks tell one another beside their collectives: that they live, where they are, and what a
rank died of. It goes over the store where they met, so it needs no collective to work.

A rank that fails says why (`report`); its peers, whose collectives break or time out, ask
(`first_cause`) and end with that word instead of their own. A rank that cannot speak any more,
killed, stopped or cut off, is known by its signs of life ceasing.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

PERIOD_S = 1.0  # between signs of life
PATIENCE_S = 2.0  # for another rank's word about a failure
_CAUSE = "hybrid/cause"
# How a rank words that a peer went away, or did not come: an effect, never the first cause.
EFFECTS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "Connection was likely closed",
    "Timed out waiting",
    "Connection refused",
)


def is_effect(message: str) -> bool:
    """Whether an error says that another rank is gone or did not come."""
    return any(words in message for words in EFFECTS)


@dataclasses.dataclass(frozen=True)
class Cause:
    """Which rank failed first, as far as this rank can tell, and why."""

    rank: int
    host: str
    message: str


class Liveness:
    """The signs of life of this rank, from now until `stop`. `where` says what it is about."""

    def __init__(self, store: Any, rank: int, world_size: int, where: Callable[[], str]) -> None:
        self.store, self.rank, self.world_size, self.where = store.clone(), rank, world_size, where
        self.host = socket.gethostname()
        self._stopped = threading.Event()
        self._beats = 0
        self._thread = threading.Thread(target=self._beat, name="liveness", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give no more signs."""
        self._stopped.set()
        self._thread.join()

    def report(self, message: str) -> None:
        """Say what this rank fails of; the first word of all ranks stands."""
        cause = json.dumps({"rank": self.rank, "host": self.host, "message": message})
        self.store.compare_set(_CAUSE, "", cause)

    def first_cause(self) -> Cause | None:
        """What a failure of this rank follows from, when it lost a peer or waited in vain; takes a
        few seconds. None where no other rank is to blame."""
        try:
            return self._reported() or self._silent() or self._astray()
        except RuntimeError:  # torch's store errors: no answer
            return Cause(0, "its host", "gone or cut off, and with it the meeting point of the run")

    def _beat(self) -> None:
        while True:
            self._beats += 1
            sign = {"beat": self._beats, "host": self.host, "where": self.where()}
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
        none = {"beat": 0, "host": "its host", "where": "starting"}
        return [json.loads(self.store.get(k)) if self.store.check([k]) else none for k in keys]

    def _silent(self) -> Cause | None:
        """A rank whose signs have ceased."""
        before = self._signs()
        time.sleep(3 * PERIOD_S)
        for rank, (old, new) in enumerate(zip(before, self._signs(), strict=True)):
            if old["beat"] == new["beat"] and rank != self.rank:
                message = f"no sign of life (killed, stopped or cut off); last seen {new['where']}"
                return Cause(rank, new["host"], message)
        return None

    def _astray(self) -> Cause | None:
        """A rank that lives, and is elsewhere than most."""
        signs = self._signs()
        usual = collections.Counter(sign["where"] for sign in signs).most_common(1)[0][0]
        for rank, sign in enumerate(signs):
            if sign["where"] != usual:
                message = f"{sign['where']}, while most ranks are {usual}"
                return Cause(rank, sign["host"], message)
        return None
