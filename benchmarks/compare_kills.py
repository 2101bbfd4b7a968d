"""Kills the parent or a rank of `hybrid compare` at drawn times, and looks at what is left.

    python -m benchmarks.compare_kills --out DIR [--first 0] [--cases 60] [--seed 0]

Run from the top folder of the checkout; 60 cases take about an hour on two cores. Five strategies
are compared on four ranks, in a folder that holds a whole comparison. In each case a process gets
SIGKILL at a time drawn over the length of a comparison that nothing befalls: the parent in a third
of the cases, else a drawn rank. Then: no process of the command may be left; no file may be half
written; nothing may be left in the temporary folder, a private one; the comparison before must be
whole, and be told from the new one; and the next comparison must end well.

A case in which the command ended before the kill does not count. DIR/cases.jsonl has a row for each
case, and a second start goes on behind them. DIR/kills.md has the counts."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .kill_traces import half_files, left_in, owners, processes_of, read_result
from .machine import summarise_machine

Row = dict[str, Any]
STRATEGIES = ("single", "ddp", "local_sgd", "fsdp", "zero1")
RANKS = 4
LIMIT_S = 600.0
JOB: dict[str, Any] = {
    "model": {"name": "mlp", "options": {"sizes": [33, 24, 16, 12, 10], "activation": "tanh"}},
    "data": {"name": "random", "options": {"samples": 101, "test_samples": 37, "features": 33}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"global_batch": 25, "micro_batches": 2, "steps": 5},
    "checkpoint": {"every": 2},
}  # fmt: skip


class Command:
    """Is one `hybrid compare` in DIR/run, with a temporary folder of its own."""

    def __init__(self, folder: Path, strategies: tuple[str, ...], *more: str) -> None:
        self.out, self.temporary = folder / "run", folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        words = ["compare", str(folder / "job.json"), "--strategies", ",".join(strategies)]
        words += ["--nproc", str(RANKS), "--out", str(self.out), *more]
        self.said = (folder / "said").open("w+")
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hybrid", *words],
            env=os.environ | {"TMPDIR": str(self.temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.said,
            start_new_session=True,
        )

    def kill(self, after_s: float, rank: int | None) -> str:
        """Kill the parent (rank: None) or a rank after so many seconds; say which, "": none.

        A rank that is not there then is killed as soon as there is one."""
        time.sleep(max(0.0, self.begun + after_s - time.monotonic()))
        while self.process.poll() is None:
            if rank is None:
                self.process.kill()
                return "parent"
            for pid, words in processes_of(self.out, rank):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                return f"rank {rank} of {Path(words[words.index('--out') + 1]).name}"
            time.sleep(0.01)
        return ""

    def wait(self) -> tuple[int, float]:
        """Return the exit status and how long it took; end what hangs."""
        try:
            code = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.said.close()
        return code, time.monotonic() - self.begun


def prepare(folder: Path) -> float:
    """Make the comparison that the first case finds, and return how long it took."""
    known = folder / "length.json"
    if not known.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(json.dumps(JOB))
        code, took = Command(folder, STRATEGIES).wait()
        if code:
            raise SystemExit(f"the comparison that nothing befalls left with {code}")
        known.write_text(json.dumps(took))
    length: float = json.loads(known.read_text())
    return length


def run_case(number: int, seed: int, folder: Path, length: float) -> Row:
    """Let one case happen, let the next comparison follow, and return what was found."""
    draw = random.Random(f"{seed}/{number}")
    rank = draw.choice([None, *range(RANKS)]) if draw.random() < 0.8 else None
    after_s = draw.uniform(0.0, length)
    old = read_result(folder / "run")
    command = Command(folder, STRATEGIES)
    whom = command.kill(after_s, rank)
    code, took = command.wait()
    problems = [f"still runs: {words}" for words in left_in(command.out)]
    problems += half_files(command.out)
    problems += [f"left in the temporary folder: {x}" for x in owners(command.temporary)]
    problems += stands(command.out, old)
    said = (folder / "said").read_text()
    if whom.startswith("rank") and (code != 1 or "SIGKILL" not in said):
        problems.append(f"the command left with {code}, and said: {said[-300:]}")
    strategies = STRATEGIES if number % 5 == 0 else STRATEGIES[:2]
    more = ("--resume", "auto") if number % 5 == 0 and whom == "parent" else ()
    after, seconds = Command(folder, strategies, *more).wait()
    problems += after_the_next(command, after)
    what = f"{whom or 'nobody'} after {after_s:.1f} s"
    row: Row = {"number": number, "what": what, "reached": bool(whom), "code": code}
    return row | {"seconds": took + seconds, "problems": problems}


def stands(out: Path, old: Row) -> list[str]:
    """Say what is wrong with the comparison before, unless a new one has taken its place."""
    now = read_result(out)
    if now == old or (now and not now["failed"]):  # it had not begun to make way, or has ended well
        return []
    for place in (out / "previous", out / "previous.part"):
        kept = read_result(place) or (now if place.suffix else {})
        if kept == old and (place / "moved.json").exists():
            lost = [x for x in old["runs"] if not any((p / x).exists() for p in (place, out))]
            return [f"the run {x} of the comparison before is gone" for x in lost]
    return ["the comparison before is gone, or is not said to be old"]


def after_the_next(command: Command, code: int) -> list[str]:
    """Say what is wrong after the comparison that followed."""
    said = (command.out.parent / "said").read_text()
    problems = [f"the next comparison left with {code}: {said[-300:]}"] if code else []
    problems += [f"after the next: {found}" for found in half_files(command.out)]
    problems += [f"after the next there is {path}" for path in command.out.rglob("*.part")]
    problems += [f"the next left in the temporary folder: {x}" for x in owners(command.temporary)]
    if (command.out / "previous").exists():
        problems.append("the next ended well, and the comparison before is still kept")
    return problems + [f"still runs: {words}" for words in left_in(command.out)]


def markdown(rows: list[Row], length: float, seed: int) -> str:
    """Return the counts, and every case in which something was wrong."""
    kinds = Counter(row["what"].split(" after ")[0].split(" of ")[0] for row in rows)
    wrong = [row for row in rows if row["problems"]]
    lines = [
        "# Kills of comparisons",
        "",
        f"Machine: {summarise_machine()}.",
        "",
        "Command: `python -m benchmarks.compare_kills --out DIR`.",
        "",
        f"{sum(row['reached'] for row in rows)} kills with seed {seed}: {', '.join(STRATEGIES)} on "
        f"{RANKS} ranks. A comparison that nothing befalls took {length:.0f} s. Nobody was killed "
        "where the command had ended before.",
        "",
        "| killed | cases |",
        "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in sorted(kinds.items())),
        "",
        f"Something was wrong in {len(wrong)} of them.",
        *(f"- {row['number']}, {row['what']}: {'; '.join(row['problems'])}" for row in wrong),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the cases that are not there yet, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (("first", 0), ("cases", 60), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    length = prepare(given.out.absolute())
    file = given.out / "cases.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    number = given.first - 1
    while sum(row["reached"] for row in rows) < given.cases:  # others had ended before their kill
        number += 1
        if number not in {row["number"] for row in rows}:
            row = run_case(number, given.seed, given.out.absolute(), length)
            rows.append(row)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(f"{number}: {row['what']}: {row['problems'] or 'well'}", file=sys.stderr)
    (given.out / "kills.md").write_text(markdown(rows, length, given.seed))
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
