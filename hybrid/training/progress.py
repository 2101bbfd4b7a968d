"""Shows runs as they go, on stderr: a table in a terminal, plain lines elsewhere.

Follows each run's `steps.jsonl`, reading only what was added since; imports no torch.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import Record, StepRecord
from ..report.formats import format_bytes, format_number

if TYPE_CHECKING:
    from rich.console import RenderableType


PLAIN_EVERY_S = 10.0  # a log wants to know that work goes on, not each step
LIVE_EVERY_S = 0.25
RECENT_STEPS = 20  # pace and ETA are their median's
WIDE = 100  # columns from which the table has room between its own
NUMBERS = ("step", "loss", "lr", "|grad|", "rate", "ms/step", "memory", "ETA")
NOTHING = "-"  # what is not known, or not yet

Step = Mapping[str, Any]  # one line of steps.jsonl


@dataclasses.dataclass
class Row:
    """What is shown of one run: `numbers` by name, all of `NUMBERS`; `words` where it did not run,
    and why."""

    numbers: dict[str, str]
    unit: str = ""  # of the rate: tok/s or samples/s; empty while there is none
    words: str = ""


class Progress:
    """A watcher for `hybrid.compare` and `hybrid train`; in lines, where a terminal is not its own
    alone (`shared`)."""

    def __init__(self, shared: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.live: Any = None
        if self.console.is_terminal and not shared:
            self.live = Live(console=self.console, auto_refresh=False)
            self.live.start()
        self.rows: dict[str, Row] = {}
        self.name, self.total, self.file, self.offset = "", 0, Path(), 0
        self.recent: collections.deque[Step] = collections.deque(maxlen=RECENT_STEPS)
        self.begun = self.arrived = self.shown = 0.0

    def started(self, name: str, steps: int, out: Path) -> None:
        """A run begins; its `steps.jsonl` grows in `out`. One that an earlier run left is removed:
        its steps are not this run's. `steps`: 0 where it is not known yet."""
        self.name, self.total, self.file, self.offset = name, steps, out / "steps.jsonl", 0
        self.file.unlink(missing_ok=True)
        self.recent.clear()
        self.begun = self.shown = time.monotonic()
        self.rows[name] = Row(dict.fromkeys(NUMBERS, "") | {"step": "starting"})
        self._show(f"{name}: starting" + (f", {steps} steps" if steps else ""))

    def poll(self) -> None:
        """Read the steps that were written since, and show them when it is time to."""
        steps = self._read()
        if steps:
            self.recent.extend(steps)
            self.arrived = time.monotonic()
        if self.recent and self._is_due():
            row = self.rows[self.name] = self._row()
            self._show(f"{self.name}: {plain_line(row)}")

    def follow(self, step: StepRecord, total: int) -> None:
        """`poll` in the process that trains, after each step: only when there is something to show,
        since the other ranks wait."""
        self.total = total
        if self._is_due():
            self.poll()

    def finished(self, name: str, record: Record) -> None:
        """A run has ended: its own figures of the whole run in place of the recent ones."""
        if record.status == "ok":
            row = summary_row(record, time.monotonic() - self.begun)
            line = f"{name}: done, {plain_line(row)}"
            if record.eval:
                line += f", eval loss {record.eval.loss:.4f}"
        else:
            row = Row({}, words=f"{record.status.replace('_', ' ')}: {record.reason}")
            line = f"{name}: {row.words}"
        self.rows[name] = row
        self._show(line)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live:
            self.live.stop()

    def _read(self) -> list[Step]:
        """The last steps among the whole lines that were added."""
        try:
            if self.file.stat().st_size == self.offset:
                return []
        except FileNotFoundError:
            return []
        with self.file.open("rb") as file:
            file.seek(self.offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]  # the last line may be half written
        self.offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()[-RECENT_STEPS:]]

    def _is_due(self) -> bool:
        every = LIVE_EVERY_S if self.live else PLAIN_EVERY_S
        return time.monotonic() - self.shown >= every

    def _row(self) -> Row:
        """The last step, with pace and time left by the recent ones."""
        last = self.recent[-1]
        seconds = median(step.get("seconds") for step in self.recent)
        done = last["step"] + 1
        eta = NOTHING
        if done >= self.total:
            eta = "ending"
        elif seconds is not None:
            since = time.monotonic() - self.arrived
            eta = format_time(max(0.0, (self.total - done) * seconds - since))
        unit, count = rate_of(last)
        rates = (s[count] / s["seconds"] for s in self.recent if s.get(count) and s.get("seconds"))
        return make_row(f"{done}/{self.total}", last, unit, median(rates), seconds, eta)

    def _show(self, line: str) -> None:
        self.shown = time.monotonic()
        if self.live:
            self.live.update(table(self.rows, self.console.width), refresh=True)
        else:
            print(line, file=sys.stderr, flush=True)


def rate_of(step: Step) -> tuple[str, str]:
    """Unit of a step's rate and the key that it counts: samples where each has one target."""
    targets = step.get("targets")
    if targets is None or targets == step.get("samples"):
        return "samples/s", "samples"
    return "tok/s", "targets"


def make_row(
    step: str, last: Step, unit: str, rate: float | None, seconds: float | None, eta: str
) -> Row:
    """One run's row from its last step and its pace; what is None is shown as not known.

    rate: in `unit`; seconds: of a step; eta: the time left, or words in its place."""
    loss, lr, norm = (last.get(key) for key in ("loss", "lr", "grad_norm"))
    memory = last.get("memory_bytes")
    numbers = (
        step,
        NOTHING if loss is None else f"{loss:.4f}",
        NOTHING if lr is None else f"{lr:.1e}",
        "skipped" if last.get("skipped") else NOTHING if norm is None else format_number(norm),
        NOTHING if rate is None else format_count(rate),
        NOTHING if seconds is None else format_number(seconds * 1e3),
        NOTHING if memory is None else format_bytes(memory),
        eta,
    )
    return Row(dict(zip(NUMBERS, numbers, strict=True)), unit if rate is not None else "")


def summary_row(record: Record, seconds: float) -> Row:
    """A run that ended well: its last step, its whole pace and peak, and the time it took."""
    last = dataclasses.asdict(record.steps[-1])
    pace = record.throughput
    unit, rate = "samples/s", pace.samples_per_s if pace else None
    if pace and pace.tokens_per_s and not math.isclose(pace.tokens_per_s, pace.samples_per_s):
        unit, rate = "tok/s", pace.tokens_per_s
    if record.memory:
        last["memory_bytes"] = max(record.memory.peak_bytes)
    step_s = pace.step_s_median if pace else None
    took = f"in {format_time(seconds)}"
    return make_row(f"{len(record.steps)}/{len(record.steps)}", last, unit, rate, step_s, took)


def plain_line(row: Row) -> str:
    """A row as words for a log; what is not known is left out."""
    n = row.numbers
    parts = {
        "step": f"step {n['step']}",
        "loss": f"loss {n['loss']}",
        "lr": f"lr {n['lr']}",
        "|grad|": f"grad norm {n['|grad|']}",
        "rate": f"{n['rate']} {row.unit}",
        "ms/step": f"{n['ms/step']} ms/step",
        "memory": n["memory"],
        "ETA": f"ETA {n['ETA']}" if n["ETA"][0].isdigit() else n["ETA"],
    }
    return ", ".join(text for key, text in parts.items() if n[key] != NOTHING)


def table(rows: Mapping[str, Row], width: int) -> RenderableType:
    """All runs, a row each; below it, in full, those that did not run and why."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    units = {row.unit for row in rows.values() if row.unit}
    grid = Table(box=None, padding=(0, 2 if width >= WIDE else 1, 0, 0), header_style="dim")
    grid.add_column("run", overflow="fold")
    for name in NUMBERS:
        title = " ".join(sorted(units)) or "rate" if name == "rate" else name
        grid.add_column(title, justify="right", no_wrap=True)
    reasons = []
    for name, row in rows.items():
        if row.words:
            reasons.append(Text(f"{name}: {row.words}", style="yellow"))
        else:
            grid.add_row(Text(name), *(row.numbers[key] for key in NUMBERS))
    return Group(grid, *reasons)


def median(values: Any) -> float | None:
    """The median of those values that are known; None where there is none."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def format_count(value: float) -> str:
    """Three digits and a unit of thousands: 950, 41.2k, 1.30M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:
            return f"{format_number(value / factor)}{unit}"
    return format_number(value)


def format_time(seconds: float) -> str:
    """A length of time: 42s, 3m05s, 1h04m, 2d03h."""
    whole = round(seconds)
    for large, small, units in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= large:
            return f"{whole // large}{units[0]}{whole % large // small:02}{units[1]}"
    return f"{whole}s" if seconds >= 9.95 else f"{seconds:.1f}s"
