"""Shows on stderr how runs go: as a table in a terminal, as plain lines elsewhere.

It follows each run's `steps.jsonl` and reads only what was added since the last look. No torch."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..job.shown import on_one_line, printable
from ..records import INTERRUPTED, Record, StepRecord, read_line
from ..report.formats import format_bytes, format_count, format_number, format_time

if TYPE_CHECKING:
    from rich.console import RenderableType


PLAIN_EVERY_S = 10.0  # the reader of a log wants to see that work goes on, not each step
LIVE_EVERY_S = 0.25
RECENT_STEPS = 20  # speed and ETA come from the median of these
WIDE = 100  # width of a terminal, in characters, from which two spaces part the table's columns
NOTHING = "-"  # stands for what is not known, or not yet

Step = Mapping[str, Any]  # one line of steps.jsonl


# The figures of a run by their columns: the key of the value, its format, its words in a log.
FIGURES: dict[str, tuple[str, Callable[[Any], str], str]] = {
    "step": ("step", str, "step {}"),
    "loss": ("loss", "{:.4f}".format, "loss {}"),
    "lr": ("lr", "{:.1e}".format, "lr {}"),
    "|grad|": ("grad_norm", format_number, "grad norm {}"),
    "rate": ("rate", format_count, "{} {unit}"),
    "ms/step": ("ms", format_number, "{} ms/step"),
    "memory": ("memory_bytes", format_bytes, "{}"),
    "ETA": ("eta", str, "{}"),
}
NUMBERS = tuple(FIGURES)


@dataclasses.dataclass
class Row:
    """Holds what is shown of one run: a text for each of `NUMBERS`, or `words`.
    A run that failed or is not possible has `words`, which say so and why."""

    numbers: dict[str, str]
    unit: str = ""  # of the rate: tok/s or samples/s; empty while the rate is not known
    words: str = ""


class Watcher:
    """Is told what runs do, and shows nothing; subclasses show it."""

    def started(self, name: str, steps: int, out: Path) -> None:
        """Note that a run begins, whose `steps.jsonl` grows in `out`; `steps`: 0 if not known."""

    def poll(self) -> None:
        """Look at the run; called often while it lasts."""

    def finished(self, name: str, record: Record) -> None:
        """Note that a run has ended, with this record."""

    def refused(self, name: str) -> None:
        """Note that a run is refused and the command ends, which says why in its one line."""

    def kept(self, name: str, record: Record) -> None:
        """Note that a run is not made again, since it has ended before with this record."""


class Progress(Watcher):
    """Shows the runs of `hybrid compare` and `hybrid train`.

    shared: other processes print to this terminal too, so plain lines are shown there as well."""

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
        self.inode = 0  # of the file: a run that goes on writes a new one
        self.recent: collections.deque[Step] = collections.deque(maxlen=RECENT_STEPS)
        self.begun = self.arrived = self.shown = 0.0
        self.held = ""  # the line on a run's beginning: a run that is refused has not begun

    def started(self, name: str, steps: int, out: Path) -> None:
        """Show that a run begins; steps that are in its `steps.jsonl` already are not shown."""
        self.name, self.total, self.file = name, steps, out / "steps.jsonl"
        self.offset, self.inode = 0, 0
        if self.file.exists():
            found = self.file.stat()
            self.offset, self.inode = found.st_size, found.st_ino
        self.recent.clear()
        self.begun = self.shown = time.monotonic()
        self.rows[name] = Row(dict.fromkeys(NUMBERS, "") | {"step": "starting"})
        line = f"{name}: starting" + (f", {steps} steps" if steps else "")
        if self.live:
            self._show(line)
        else:
            self.held = line

    def poll(self) -> None:
        """Read the steps that were added, and show the last one if the display is due."""
        steps = self._read()
        if steps:
            self.recent.extend(steps)
            self.arrived = time.monotonic()
        if self.recent and self._is_due():
            row = self.rows[self.name] = self._row()
            self._show(f"{self.name}: {plain_line(row)}")
        elif self.held and self._is_due():
            self._release()

    def follow(self, step: StepRecord, total: int) -> None:
        """Poll in the process that trains, after each step of `total`, if the display is due.
        It reads nothing at other times, because the other ranks wait for this process."""
        self.total = total
        self._release()
        if not self.recent:
            self.inode = 0  # an earlier run's file may have had its place when this one began
        if self._is_due():
            self.poll()

    def finished(self, name: str, record: Record) -> None:
        """Show the figures of the whole run, or why it did not end well."""
        if record.status == "ok":
            row = summary_row(record, time.monotonic() - self.begun)
            line = f"{name}: done, {plain_line(row)}"
            if record.eval:
                line += f", eval loss {record.eval.loss:.4f}"
                line += "".join(f", {n} {v:.5g}" for n, v in record.eval.metrics.items())
        else:
            words = f"{record.status.replace('_', ' ')}: {record.reason}"
            if record.reason == INTERRUPTED and record.checkpoint:
                words = f"interrupted after step {record.checkpoint.step}, where its state is saved"
            row = Row({}, words=on_one_line(words))
            line = f"{name}: {row.words}"
        self.rows[name] = row
        self._show(line)

    def refused(self, name: str) -> None:
        """Show the run no more."""
        self.held = ""
        self.rows.pop(name, None)
        if self.live:
            self._show("")

    def kept(self, name: str, record: Record) -> None:
        """Show the run's figures, without the time that it took."""
        row = self.rows[name] = summary_row(record, 0.0)
        row.numbers["ETA"] = "kept"
        self._show(f"{name}: {plain_line(row)}")

    def close(self) -> None:
        """Stop the live table and leave the terminal as it was."""
        if self.live:
            self.live.stop()

    def _read(self) -> list[Step]:
        """Return the steps of the whole lines that were added, at most `RECENT_STEPS` of them."""
        try:
            found = self.file.stat()
            if found.st_size < self.offset or found.st_ino != self.inode:  # it begins anew
                self.offset, self.inode = 0, found.st_ino
            if found.st_size == self.offset:
                return []
        except FileNotFoundError:
            return []
        with self.file.open("rb") as file:
            file.seek(self.offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]  # the last line may be half written
        self.offset += len(whole)
        return [read_line(line) for line in whole.splitlines()[-RECENT_STEPS:]]

    def _is_due(self) -> bool:
        every = LIVE_EVERY_S if self.live else PLAIN_EVERY_S
        return time.monotonic() - self.shown >= every

    def _row(self) -> Row:
        """Make the row of the last step, with speed and time left from the recent steps."""
        last = self.recent[-1]
        seconds = median(step.get("seconds") for step in self.recent)
        done = last["step"] + 1
        left = self.total - done
        eta = NOTHING if left > 0 else "ending"
        if left > 0 and seconds is not None:
            since = time.monotonic() - self.arrived
            eta = format_time(max(0.0, left * seconds - since))
        unit, count = rate_of(last)
        rates = (s[count] / s["seconds"] for s in self.recent if s.get(count) and s.get("seconds"))
        return make_row(f"{done}/{self.total}", last, unit, median(rates), seconds, eta)

    def _release(self) -> None:
        """Print the line that was held back, if there is one."""
        line, self.held = self.held, ""
        if line:
            self._show(line)

    def _show(self, line: str) -> None:
        self._release()
        self.shown = time.monotonic()
        if self.live:
            self.live.update(table(self.rows, self.console.width), refresh=True)
        else:
            print(on_one_line(line), file=sys.stderr, flush=True)


def rate_of(step: Step) -> tuple[str, str]:
    """Return the unit of a step's rate and the key that it counts.
    The rate is of samples where each sample has one target, and of tokens elsewhere."""
    targets = step.get("targets")
    if targets is None or targets == step.get("samples"):
        return "samples/s", "samples"
    return "tok/s", "targets"


def make_row(
    step: str, last: Step, unit: str, rate: float | None, seconds: float | None, eta: str
) -> Row:
    """Make a run's row from its last step and its speed; None is shown as not known.
    rate: in `unit`; seconds: of a step; eta: the time left, or words in its place."""
    ms = None if seconds is None else seconds * 1e3
    values = {**last, "step": step, "rate": rate, "ms": ms, "eta": eta}
    numbers = {
        name: NOTHING if values.get(key) is None else form(values[key])
        for name, (key, form, _) in FIGURES.items()
    }
    if last.get("skipped"):
        numbers["|grad|"] = "skipped"
    return Row(numbers, unit if rate is not None else "")


def summary_row(record: Record, seconds: float) -> Row:
    """Make the row of a run that ended well: last step, speed and peak of the run, time taken."""
    last = dataclasses.asdict(record.steps[-1]) if record.steps else {}
    done = last["step"] + 1 if last else 0  # a resumed run may lack the steps before it
    pace = record.throughput
    unit, rate = "samples/s", pace.samples_per_s if pace else None
    if pace and pace.tokens_per_s and not math.isclose(pace.tokens_per_s, pace.samples_per_s):
        unit, rate = "tok/s", pace.tokens_per_s
    if record.memory:
        last["memory_bytes"] = max(record.memory.peak_bytes)
    step_s = pace.step_s_median if pace else None
    took = f"in {format_time(seconds)}"
    return make_row(f"{done}/{done}" if last else NOTHING, last, unit, rate, step_s, took)


def plain_line(row: Row) -> str:
    """Write a row as words for a log, without what is not known."""
    words = {name: text for name, (_, _, text) in FIGURES.items()}
    if row.numbers["ETA"][0].isdigit():
        words["ETA"] = "ETA {}"
    known = {name: text for name, text in row.numbers.items() if text != NOTHING}
    return ", ".join(words[name].format(text, unit=row.unit) for name, text in known.items())


def table(rows: Mapping[str, Row], width: int) -> RenderableType:
    """Return a table with a row for each run; below it stand the runs that failed, and why."""
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
            reasons.append(Text(f"{printable(name)}: {row.words}", style="yellow"))
        else:
            grid.add_row(Text(printable(name)), *(row.numbers[key] for key in NUMBERS))
    return Group(grid, *reasons)


def median(values: Any) -> float | None:
    """Return the median of the values that are not None, or None where all are."""
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None
