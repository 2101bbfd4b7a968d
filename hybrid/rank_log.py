"""A rank's log, `OUT/logs/rankN.log`, under launchers that keep none. No torch.

All that this process writes to its standard output and error goes there, messages of C++, of
faulthandler and of processes that it starts too. What Python prints, warnings and tracebacks among
it, is on the launcher's terminal as well. That takes no further process, so none can be left.
`hybrid.launch` makes the logs of ranks that it starts itself.
"""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO

from .launchers import Ranks


def keep(logs: Path, ranks: Ranks) -> None:
    """Write this rank's log from now on, a new one. What an earlier run left goes, of ranks that
    this one does not have too. Rank 0 says where the logs are."""
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank*"):
        number = re.match(r"rank(\d+)\.", old.name)
        if number and int(number[1]) % ranks.world_size == ranks.rank:
            old.unlink(missing_ok=True)  # not only emptied: its processes may still write there
    if ranks.rank == 0:
        print(f"hybrid: what each rank N prints is in {logs}/rankN.log", file=sys.stderr)
    with (logs / f"rank{ranks.rank}.log").open("wb") as log:
        sys.stdout = _divert(sys.stdout, 1, log.fileno())
        sys.stderr = _divert(sys.stderr, 2, log.fileno())


def _divert(stream: TextIO, number: int, log: int) -> TextIO:
    """Point the descriptor at the log; returns what writes there and to where it pointed before."""
    stream.flush()
    both = io.BufferedWriter(_Both(number, os.dup(number)))
    os.dup2(log, number)
    return io.TextIOWrapper(both, stream.encoding, stream.errors, line_buffering=True)


class _Both(io.RawIOBase):
    """Two descriptors that get the same; `fileno` is the first."""

    def __init__(self, log: int, terminal: int) -> None:
        self.log, self.terminal = log, terminal

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.log

    def write(self, data: Any) -> int:
        for number in (self.log, self.terminal):
            left = memoryview(data)
            while left:
                left = left[os.write(number, left) :]
        return len(data)
