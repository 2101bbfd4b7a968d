"""Counts wrong verdicts: right jobs that are called not equal, and faults that are called equal.

    python -m benchmarks.verdicts --out DIR [--jobs 300] [--faults 100] [--seed 0]
    python -m benchmarks.verdicts --out DIR --only 17          # the job of that seed, once more
    python -m benchmarks.verdicts --out DIR --only-fault 17

Run from the top folder; about an hour on two cores. Each job is drawn by its seed: architecture,
loss, optimizer, rate, precision, 1 to 60 steps, odd sizes, three strategies on 2 or 4 processes.
All of them must be called equal. Each fault is planted in one strategy's ranks, and must not be.
Jobs that diverge or that no strategy can run do not count, nor do faults that changed nothing that
could be measured; they are listed, and others are drawn in their place.

DIR/jobs.jsonl and DIR/faults.jsonl have a row each, and a second start goes on behind them.
DIR/verdicts.md has the counts. The folders of wrong verdicts stay in DIR/jobs and DIR/faults."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from hybrid.launch.warm import warm_ranks

from .machine import summarise_machine
from .verdict_campaign import page
from .verdict_campaign.campaign import Row, run_fault, run_job

Run = Callable[[int, Path], Row]


def run_until(
    run: Run, file: Path, out: Path, wanted: int, first: int, counts: Callable[[Row], bool]
) -> list[Row]:
    """Run seed after seed from `first` until so many rows count; return all rows by then.

    Rows that `file` already has are taken from there; new ones are added to it, one a line."""
    known = {row["seed"]: row for row in read_rows(file)}
    rows: list[Row] = []
    for seed in itertools.count(first):
        done = sum(map(counts, rows))
        if done >= wanted:
            return rows
        if seed not in known:
            known[seed] = run(seed, out)
            with file.open("a") as lines:
                lines.write(json.dumps(known[seed]) + "\n")
            print(
                f"{file.stem} {done + 1}/{wanted}: {page.line(known[seed])}",
                file=sys.stderr,
                flush=True,
            )
        rows.append(known[seed])
    raise AssertionError("seeds do not end")


def read_rows(file: Path) -> list[Row]:
    """Read the rows of earlier starts. A last line that an interruption cut off is removed."""
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        print(f"{file}: the last line is cut off; its seed runs again", file=sys.stderr)
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def main() -> None:
    """Run the campaign, or one seed of it, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=300, help="right jobs that count")
    parser.add_argument("--faults", type=int, default=100, help="planted faults that count")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", type=int, help="run this job alone and keep its folder")
    parser.add_argument("--only-fault", type=int, help="run this fault alone and keep its folder")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with warm_ranks():
        for seed, run in ((given.only, run_job), (given.only_fault, run_fault)):
            if seed is not None:
                print(json.dumps(run(seed, given.out, keep=True), indent=1))
        if (given.only, given.only_fault) != (None, None):
            return
        jobs, faults = given.out / "jobs.jsonl", given.out / "faults.jsonl"
        right = run_until(run_job, jobs, given.out, given.jobs, given.seed, page.job_counts)
        wrong = run_until(run_fault, faults, given.out, given.faults, given.seed, page.fault_counts)
    command = shlex.join(["python", "-m", "benchmarks.verdicts", *sys.argv[1:]])
    text = page.markdown(right, wrong, command, summarise_machine())
    (given.out / "verdicts.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
