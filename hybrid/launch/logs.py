"""This module writes each rank's log, `OUT/logs/rankN.log`, under launchers that keep none.

All that this process writes to its standard output and error goes there, also the messages of C++,
of faulthandler and of processes that it starts. What Python prints, with warnings and tracebacks,
is on the launcher's terminal as well. That needs no further process, so none can be left behind.
`hybrid.launch.local` makes the logs of ranks that it starts itself. The module needs no torch."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO

from ..records.whole import new_file
from .placement import Placement

LOG = re.compile(  # what ranks leave in `logs`
    r"\.?rank(\d+)\.(log|error\.json|waits\.json|where)(\.[0-9a-f]+)?(\.part)?"
)

LAUNCHER_LOG = "launcher.log"  # what another launcher prints, in `logs`


def list_logs(logs: Path) -> list[Path]:
    """Return the logs of ranks in a folder, and what else a run leaves there."""
    if not logs.is_dir():
        return []
    ours = (p for p in logs.iterdir() if LOG.fullmatch(p.name) or p.name == LAUNCHER_LOG)
    return [path for path in ours if not path.is_dir()]


def redirect_output(logs: Path, placement: Placement) -> None:
    """Write this rank's output to a new log from now on; rank 0 prints where the logs are.

    Deletes logs left by an earlier run, including those of ranks this run does not have."""
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.iterdir():
        number = LOG.fullmatch(old.name)
        if number and int(number[1]) % placement.world_size == placement.rank:
            old.unlink(missing_ok=True)  # not emptied, since old processes may still write there
    if placement.rank == 0:
        print(f"hybrid: what each rank N prints is in {logs}/rankN.log", file=sys.stderr)
    with new_file(logs / f"rank{placement.rank}.log") as log:
        sys.stdout = _divert(sys.stdout, 1, log.fileno())
        sys.stderr = _divert(sys.stderr, 2, log.fileno())


def _divert(stream: TextIO, number: int, log: int) -> TextIO:
    """Point a descriptor at the log, and return a stream to the log and to its old target."""
    stream.flush()
    both = io.BufferedWriter(_Both(number, os.dup(number)))
    os.dup2(log, number)
    return io.TextIOWrapper(both, stream.encoding, stream.errors, line_buffering=True)


class _Both(io.RawIOBase):
    """Writes the same to two descriptors, as far as each takes it; `fileno` is the log's."""

    def __init__(self, log: int, terminal: int) -> None:
        self.log, self.terminal = log, terminal

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.log

    def write(self, data: Any) -> int:
        for number in (self.log, self.terminal):
            left = memoryview(data)
            with contextlib.suppress(OSError):  # a terminal that is gone, a full disk
                while left:
                    left = left[os.write(number, left) :]
        return len(data)
