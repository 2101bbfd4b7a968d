"""Soaks runs in faults, drawn by a seed: laps of one run each, which goes on after every fault.

A lap's steps are slowed down, so that a fault comes about every `--every` seconds. Every lap is
then held against a run of the same steps that nothing befell. See benchmarks/checkpoint_kills.py.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.checkpoint.folders import list_checkpoints, step_of
from hybrid.records import Record
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests.accidents import Accident
from tests.test_failures import ranks_pids

from .kill_cases import (
    COMMITTING,
    EVERY,
    PRUNING,
    WRITING,
    Reference,
    Row,
    after_death,
    at_end,
    chosen,
    committed,
    ended,
    job_of,
    num_ranks,
)

PACE_S = 0.1  # which each step takes more
STEPS = 300
STRATEGIES = ("single", "fsdp", "ddp")


class Fault(NamedTuple):
    """Is what befalls a run: what its ranks plant, or a signal after some seconds, or both."""

    accident: Accident = Accident()
    number: int = 0
    after_s: float = 0.0
    all_ranks: bool = False
    damages: bool = False  # the newest checkpoint, once the run has ended


def draw_fault(kind: str, draw: random.Random, ranks: int, every_s: float) -> Fault:
    """Return a fault of a kind, at an instant that is drawn."""
    after_s = every_s * draw.uniform(0.5, 1.5)
    rank, save = draw.randrange(ranks), max(2, int(after_s / PACE_S / EVERY / 2))
    if kind == "killed in a save":
        call, nth = draw.choice([*WRITING, *COMMITTING, *PRUNING])
        after, mine = draw.random() < 0.5, rank if call == "block" else 0
        return Fault(Accident(mine, "saving", save, call, nth, after))
    if kind == "no room in a save":
        return Fault(Accident(rank, "saving", save, "block", draw.randrange(10), what="full"))
    if kind == "a rank told to end":
        return Fault(number=signal.SIGTERM, after_s=after_s)
    return Fault(Accident(), signal.SIGKILL, after_s, "all" in kind, "damaged" in kind)


KINDS = (
    "a rank killed",
    "all ranks killed",
    "a rank told to end",
    "killed in a save",
    "no room in a save",
    "a rank killed, the newest checkpoint damaged",
)


def soak(given: Any) -> list[Row]:
    """Run laps until so many faults have happened; return a row of each lap."""
    draw, laps, left = random.Random(given.seed), list[Row](), given.faults
    reference = functools.cache(lambda name: Reference(name, given.out / "references", STEPS, 1))
    while left > 0:
        strategy = STRATEGIES[len(laps) % len(STRATEGIES)]
        lap = _Lap(strategy, reference(strategy), given.out / "lap", draw, given.every).run(left)
        left -= sum(lap["faults"].values())
        laps.append(lap)
        print(f"lap {len(laps)}: {lap}; {left} faults left", file=sys.stderr, flush=True)
    return laps


class _Lap:
    """Is one run, from its start to its end through all faults between."""

    def __init__(
        self, strategy: str, reference: Reference, out: Path, draw: random.Random, every_s: float
    ) -> None:
        self.strategy, self.reference, self.out, self.draw = strategy, reference, out, draw
        self.every_s, self.job = every_s, job_of(strategy, True, STEPS)
        self.problems, self.faults = list[str](), Counter[str]()
        self.damaged, self.stopped = set[int](), set[int]()

    def run(self, most: int) -> Row:
        """Run it, with so many faults at most, and return what was found."""
        shutil.rmtree(self.out, ignore_errors=True)
        record = None
        while record is None:
            kind = self.draw.choice(KINDS) if self.faults.total() < most else ""
            fault, began = Fault(), time.monotonic()
            if kind:
                fault = draw_fault(kind, self.draw, num_ranks(self.strategy), self.every_s)
            record, reason = self._until(fault)
            if record is None:
                self.faults[kind] += 1
                took = f"{time.monotonic() - began:.0f} s"
                print(
                    f"{self.strategy}: {kind}, {took}: {reason[:90]}", file=sys.stderr, flush=True
                )
                if not reason:
                    raise RuntimeError("a run ended without a record and without a reason")
                self._look(fault)
        self.problems += at_end(self.out, self.reference, record, self.stopped)
        return {
            "strategy": self.strategy, "steps": STEPS, "faults": dict(self.faults),
            "problems": self.problems,
        }  # fmt: skip

    def _until(self, fault: Fault) -> tuple[Record | None, str]:
        """Run until a fault or to the end; return the record, or why it ended."""
        start = chosen(self.out, self.job, self.strategy)
        whole = [step for step, (_, wrong) in committed(self.out).items() if not wrong]
        if (step_of(start) if start else 0) != max(whole, default=0):
            self.problems.append(f"went on from {start}, whole are {whole}")
        program = dataclasses.replace(fault.accident, pace_s=PACE_S).program()
        found: list[Record] = []
        timer = threading.Timer(fault.after_s, self._strike, [fault])
        if fault.number:
            timer.start()
        reason = ended(
            lambda: found.append(
                launch(
                    self.job,
                    self.strategy,
                    num_ranks(self.strategy),
                    self.out,
                    Watcher(),
                    program=program,
                    resume=start,
                )
            )
        )
        timer.cancel()
        return (found[0] if found else None), reason

    def _strike(self, fault: Fault) -> None:
        ranks = ranks_pids(self.out)
        for pid in ranks if fault.all_ranks else ranks[-1:]:
            os.kill(pid, fault.number)

    def _look(self, fault: Fault) -> None:
        """Note what is wrong after a fault, and damage the newest checkpoint if it says so."""
        found = committed(self.out)
        if fault.number == signal.SIGTERM:  # which has it save, wherever it is
            self.stopped.add(max(found, default=0))
        self.damaged &= {step for step, (_, wrong) in found.items() if wrong}
        self.problems += after_death(self.out, self.reference, self.damaged)
        whole = [step for step, (_, wrong) in found.items() if not wrong]
        if fault.damages and len(whole) > 1 and max(found) == max(whole):
            self.damaged.add(max(whole))
            newest = list_checkpoints(self.out / "checkpoints")[0]
            file = self.draw.choice(sorted(newest.iterdir()))
            content = bytearray(file.read_bytes())
            place = self.draw.randrange(len(content))
            how = self.draw.choice(("flipped", "cut", "removed"))
            if how == "removed":
                file.unlink()
                return
            content[place] ^= 1 << self.draw.randrange(8)
            file.write_bytes(content if how == "flipped" else content[:place])
