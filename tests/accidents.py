"""Has one rank meet an accident, then runs the command: `accidents.py SPEC train ...`.

SPEC is an `Accident` as JSON. Its instants are those at which the state of the disk or of the
ranks differs: each call of the system within a save, before it and after it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What a save asks of the system. `block`: of a rank's file; `manifest`: half of it is written.
CALLS = ("mkdir", "mkfifo", "fdatasync", "fsync", "rename", "unlink", "rmdir")
CHANNEL = (".pipe", ".room")  # how names of channels end: to unlink one is to "unpipe"

LATE_S = 0.3  # in which many steps could be made


@dataclasses.dataclass(frozen=True)
class Accident:
    """What befalls one rank, and when.

    phase: "loading", "step", "evaluation", "saving" or "never". at: which reading of a file, step,
    evaluation or save of this process, from 0. call, nth, after: which call of a save, and whether
    before or after it. what: "kill", "full" (files grow no more), "old" (every snapshot of an
    asynchronous save keeps the first one's tensors), "late" (what is copied beside the training is
    copied late). pace_s: which each step takes more."""

    rank: int = 0
    phase: str = "never"
    at: int = 0
    call: str = ""
    nth: int = 0
    after: bool = False
    what: str = "kill"
    pace_s: float = 0.0

    def program(self) -> list[str]:
        """Return the command that starts a rank with it."""
        return [sys.executable, __file__, json.dumps(dataclasses.asdict(self))]


class _Saves:
    """Counts the calls of the save in which the accident is to happen."""

    def __init__(self, accident: Accident) -> None:
        self.accident, self.saves, self.calls = accident, 0, 0
        self.active = False  # a save is being made

    def around(self, call: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of the system with the accident before or after it."""

        def counted(*arguments: Any, **options: Any) -> Any:
            name = str(arguments[0]) if call == "unlink" else ""
            due = self.is_due("unpipe" if name.endswith(CHANNEL) else call)
            if due and not self.accident.after:
                act(self.accident)
            found = work(*arguments, **options)
            if due and self.accident.after:
                act(self.accident)
            return found

        return counted

    def is_due(self, call: str) -> bool:
        """Whether the accident happens at this call."""
        accident = self.accident
        mine = self.active and self.saves == accident.at + 1
        if not mine or call != accident.call:
            return False
        self.calls += 1
        return self.calls == accident.nth + 1


def act(accident: Accident) -> None:
    """Let it happen."""
    if accident.what == "full":
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes of a file
        return
    os.kill(os.getpid(), signal.SIGKILL)


def plant(accident: Accident) -> None:
    """Put the accident in its place."""
    from hybrid.measure.clock import Instruments
    from hybrid.training import checkpointing, in_progress

    if accident.what == "old":
        copy = checkpointing.Snapshot.copy
        checkpointing.Snapshot.copy = lambda self, into, later=None: (  # type: ignore[method-assign]
            copy(self, None) if into is None else dataclasses.replace(self, shares=into.shares)
        )
    elif accident.what == "late":
        fill = checkpointing.fill
        checkpointing.fill = lambda unfilled: (time.sleep(LATE_S), fill(unfilled))[1]
    elif accident.phase == "loading":
        from hybrid.checkpoint.load import Reader

        Reader.read_into = _nth(accident, Reader.read_into)  # type: ignore[method-assign]
    elif accident.phase == "step":
        Instruments.step = _nth(accident, Instruments.step)  # type: ignore[method-assign]
    elif accident.phase == "evaluation":
        in_progress.evaluate = _nth(accident, in_progress.evaluate)
    elif accident.phase == "saving":
        _plant_in_save(_Saves(accident))


def slow_down(pace_s: float) -> None:
    """Have each step take so much longer."""
    from hybrid.measure.clock import Instruments

    enter = Instruments.step

    def step(self: Any, number: int, make: Callable[[], None]) -> None:
        time.sleep(pace_s)
        enter(self, number, make)

    Instruments.step = step  # type: ignore[method-assign]


def _nth(accident: Accident, work: Callable[..., Any]) -> Callable[..., Any]:
    seen = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == accident.at + 1:
            act(accident)
        return work(*arguments, **options)

    return counted


def _plant_in_save(saves: _Saves) -> None:
    from hybrid.checkpoint import save, tensors
    from hybrid.training import checkpointing

    work, blocks, write = checkpointing.save, tensors._blocks_of, save.write_flushed

    def saving(*arguments: Any, **options: Any) -> Any:
        saves.saves, saves.calls, saves.active = saves.saves + 1, 0, True
        try:
            return work(*arguments, **options)
        finally:
            saves.active = False

    def with_blocks(parts: Any) -> Iterator[Any]:
        for block in blocks(parts):
            if saves.is_due("block"):
                act(saves.accident)
            yield block

    def half(path: Path, text: str) -> None:
        if saves.is_due("manifest"):
            path.write_text(text[: len(text) // 2])
            act(saves.accident)
        write(path, text)

    checkpointing.save = saving
    tensors._blocks_of = with_blocks
    save.write_flushed = half
    for call in CALLS:
        setattr(os, call, saves.around(call, getattr(os, call)))


def main() -> None:
    """The command, in a rank."""
    accident = Accident(**json.loads(sys.argv.pop(1)))
    from hybrid.launch.placement import find_placement

    if accident.pace_s:
        slow_down(accident.pace_s)
    if find_placement().rank == accident.rank or accident.what == "old":
        plant(accident)
    from hybrid.cli import main

    main()


if __name__ == "__main__":
    main()
