"""Shows runs as they go, on stderr: a live line each in a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from .records import Record

PLAIN_EVERY_S = 10.0  # a log wants to know that work goes on, not each step


class Progress:
    """A watcher for `hybrid.compare` and `hybrid train`: follows each run's `steps.jsonl`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.live: Any = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=4, transient=False)
            self.live.start()
        self.lines: dict[str, str] = {}
        self.name, self.total, self.file, self.offset = "", 0, Path(), 0
        self.begun = self.printed = 0.0

    def started(self, name: str, steps: int, out: Path) -> None:
        """A run begins; its `steps.jsonl` grows in `out`."""
        self.name, self.total, self.file, self.offset = name, steps, out / "steps.jsonl", 0
        self.file.unlink(missing_ok=True)
        self.begun = self.printed = time.monotonic()
        self._show(name, "starting", always=True)

    def poll(self) -> None:
        """Read the steps that were written since."""
        if not self.file.exists():
            return
        with self.file.open() as file:
            file.seek(self.offset)
            text = file.read()
        whole, newline, _ = text.rpartition("\n")
        if not newline:
            return
        self.offset += len((whole + newline).encode())
        step = json.loads(whole.splitlines()[-1])
        self._show(self.name, f"step {step['step'] + 1}/{self.total}  loss {step['loss']:.4f}")

    def finished(self, name: str, record: Record) -> None:
        """A run has ended."""
        if record.status == "ok":
            seconds = time.monotonic() - self.begun
            last = record.steps[-1]
            words = f"done  {len(record.steps)} steps  loss {last.loss:.6f}  in {seconds:.1f} s"
        else:
            words = f"{record.status.replace('_', ' ')}: {record.reason}"
        self._show(name, words, always=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live:
            self.live.stop()

    def _show(self, name: str, words: str, always: bool = False) -> None:
        self.lines[name] = words
        if self.live:
            from rich.text import Text

            self.live.update(Text("\n".join(f"{n:22} {w}" for n, w in self.lines.items())))
        elif always or time.monotonic() - self.printed > PLAIN_EVERY_S:
            self.printed = time.monotonic()
            print(f"{name}: {words}", file=sys.stderr, flush=True)
