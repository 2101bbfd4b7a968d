"""This module forms an opinion on whose fault it is while a rank still waits.

Once a collective has timed out, it is late: NCCL's watchdog ends the process without a word, and
peers that have left look like peers that were killed. So a rank that makes no progress for a while
looks at what all ranks say, keeps the result, and writes it to `logs/rankN.waits.json`, where the
launcher finds it. Progress takes it back."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from .. import records
from .blame import Cause, Sign, find_cause

SHARE = 0.3  # of a collective's timeout, after which a rank without progress looks around
LOOK_S = 3.0  # between two looks


class StallWatch:
    """Holds the verdict of a rank that waits, as long as it makes no progress.

    patience_s: without progress until it looks."""

    def __init__(self, rank: int, patience_s: float, file: Path | None) -> None:
        self.rank, self.patience_s, self.file = rank, patience_s, file
        self.verdict: Cause | None = None
        self._progress: Hashable = None
        self._since = 0.0
        self._before: tuple[float, Sequence[Sign]] | None = None

    def look(self, progress: Hashable, signs: Callable[[], Sequence[Sign]]) -> None:
        """Take note of how far this rank is; called again and again, and never waits.

        progress: anything that changes with it. signs: asks what the ranks say."""
        now = time.monotonic()
        if progress != self._progress:
            self._progress, self._since, self._before = progress, now, None
            if self.verdict is not None:
                self.verdict = None
                self._write()
        elif self.verdict is None and now - self._since >= self.patience_s:
            if self._before is None:
                self._before = now, signs()
            elif now - self._before[0] >= LOOK_S:
                found = signs()
                self.verdict = find_cause(self._before[1], found, self.rank)
                self._before = now, found
                if self.verdict is not None:
                    self._write()

    def _write(self) -> None:
        """Write the verdict where the launcher finds it, or remove it."""
        if self.file is None:
            return
        with contextlib.suppress(OSError):
            if self.verdict is None:
                self.file.unlink(missing_ok=True)
            else:
                records.write(dataclasses.asdict(self.verdict), self.file)
