"""Hands the command line what strangers and bad luck would, and counts what breaks the contract.

    python -m benchmarks.hostile --out FOLDER [--cases N] [--seed N] [--kinds A,B] [--only KIND:N]

Run from the top folder; about two seconds a case. Each case is a `python -m hybrid` of its own, in
a folder of its own. It must end in time with a status that its kind allows; wrong input must end
with 2 and one line, `hybrid: ...`, which names the field or the file, before 2 s of CPU where no
process has to start. No traceback, no process, no file of others changed, nothing left in TMPDIR,
and nothing of what only a stranger named may have run. FOLDER/cases.jsonl has a row for each case,
and FOLDER/hostile.md the counts. The command goes on where it was stopped: rows that are there are
kept. FOLDER/kept has the folders of the cases that broke the contract."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from .hostile_cases import (
    flags,
    folders,
    functions,
    hugging_face,
    jobs,
    launchers,
    runs,
    surroundings,
)
from .hostile_cases.case import Case, run_of
from .hostile_cases.judge import clear, run, shell_line
from .machine import summarise_machine

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
# The kinds, and how many of each hundred cases are of each.
KINDS: dict[ModuleType, int] = {
    flags: 26, runs: 18, functions: 12, folders: 11, launchers: 10, surroundings: 10, jobs: 7,
    hugging_face: 6,
}  # fmt: skip
NAMES = {module.KIND: module for module in KINDS}


def draw(seed: int, kind: str, number: int) -> Case:
    """Return one case; it depends on these three alone."""
    case: Case = NAMES[kind].draw(run_of(seed, kind, number), number)
    return case


def plan(cases: int, seed: int, kinds: list[str]) -> list[Case]:
    """Return so many cases, of each kind its share, in an order in which each comes early."""
    shares = {k: KINDS[NAMES[k]] for k in kinds}
    given = Counter[str]()
    found = []
    for _ in range(cases):
        kind = min(kinds, key=lambda k: (given[k] + 1) / shares[k])
        found.append(draw(seed, kind, given[kind]))
        given[kind] += 1
    return found


def run_case(case: Case, seed: int, tree: Path, keep: Path | None) -> Row:
    """Run a case, and return its row. keep: where its folder stays if something is wrong."""
    base = Path(tempfile.mkdtemp(prefix="hybrid-hostile-"))
    folder = base / "case"
    try:
        end = run(case, folder, tree)
        if end.problems and keep:
            target = keep / case.name.replace(":", "-")
            clear(target)
            keep.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, target)
    finally:
        clear(base)
    variables = {
        k: os.fsdecode(v)[:200] if v is not None else None for k, v in case.environment.items()
    }
    return {
        "kind": case.kind, "number": case.number, "seed": seed, "what": ascii(case.what)[1:-1],
        "command": shell_line(case, ["hybrid"])[:1000],
        "environment": dict(list(variables.items())[:20]),
        "allowed": sorted(case.ends), **end.__dict__,
    }  # fmt: skip


def read_rows(path: Path) -> list[Row]:
    """Return the rows of an earlier start; a last line that was cut is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


WORDS = """
A case is drawn by the seed, its kind and its number alone. It runs the command line in a folder of
its own, as a process of its own, and breaks the contract if

- its status is none that its kind allows (2 for wrong input, 3 where the machine lacks something);
- wrong input ends with more or less than one line `hybrid: ...` beside warnings, or the line does
  not name the option, the field or the file, and where one can show it the value;
- a traceback, a control character or a line of more than 3,000 characters is printed; a traceback
  of a user's own code is allowed where the run failed (status 1);
- it still runs after 90 s, starts more than 100 processes, or leaves one;
- it changes, makes or removes a file outside `--out`, or one in it that is not a run's by name, or
  leaves one in TMPDIR (but for the cache that torch makes there);
- anything ran that only a stranger's folder, model or pickle names: each would make a file;
- a refusal takes more than 2 s of CPU, user and system of all processes, where none has to start.

`python -m benchmarks.hostile --out FOLDER --only KIND:NUMBER` runs one of them again.
"""


def summarise(rows: list[Row], command: str) -> str:
    """Return the page of a campaign."""
    kinds = [k for k in NAMES if any(r["kind"] == k for r in rows)]
    wrong = [r for r in rows if r["problems"]]
    seeds = ", ".join(sorted({str(r["seed"]) for r in rows}))
    lines = [
        "# Hostile input and bad luck, counted\n", f"`{command}`: {summarise_machine()}.\n",
        f"{len(rows)} cases, seed {seeds}: **{len(wrong)} break the contract**.", WORDS,
        "| kind | cases | broken | 0 | 1 | 2 | 3 | other | CPU s: median | refused: at most |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for kind in kinds:
        them = [r for r in rows if r["kind"] == kind]
        ends = Counter(r["status"] if r["status"] in (0, 1, 2, 3) else "other" for r in them)
        cpu = sorted(r["cpu_s"] for r in them)
        refused = max((r["cpu_s"] for r in them if r["status"] == 2), default=0)
        counts = " | ".join(str(ends[k]) for k in (0, 1, 2, 3, "other"))
        broken = sum(bool(r["problems"]) for r in them)
        median = f"{cpu[len(cpu) // 2]:.1f}"
        lines.append(f"| {kind} | {len(them)} | {broken} | {counts} | {median} | {refused:.1f} |")
    lines.append("\n## What broke it\n" if wrong else "\nNothing broke it.")
    for row in wrong:
        said = "; ".join(row["problems"]).replace("|", "\\|").replace("\n", " ")
        lines.append(f"- `{row['kind']}:{row['number']}` {row['what']}: {said[:400]}")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(NAMES))
    parser.add_argument("--only", action="append", help="KIND:NUMBER, again; repeatable")
    parser.add_argument(
        "--tree", type=Path, default=ROOT, help="the checkout to try; left out: this one"
    )
    parser.add_argument("--at-once", type=int, default=1, help="cases at a time")
    parser.add_argument("--seconds", type=float, help="stop after so many; start again to go on")
    return parser.parse_args()


def main() -> int:
    """Run the campaign; exit status 1 where a case broke the contract."""
    asked = parse()
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "cases.jsonl"
    rows = read_rows(file)
    cases = plan(asked.cases, asked.seed, asked.kinds.split(","))
    if asked.only:
        pairs = [name.split(":") for name in asked.only]
        cases = [draw(asked.seed, kind, int(number)) for kind, number in pairs]
        rows = [
            r
            for r in rows
            if f"{r['kind']}:{r['number']}" not in asked.only or r["seed"] != asked.seed
        ]
    done = {(r["kind"], r["number"], r["seed"]) for r in rows}
    rest = [c for c in cases if (c.kind, c.number, asked.seed) not in done]
    deadline = time.monotonic() + (asked.seconds or float("inf"))
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    def one(case: Case) -> None:
        if time.monotonic() < deadline:
            row = run_case(case, asked.seed, asked.tree.resolve(), asked.out / "kept")
            rows.append(row)
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            if row["problems"] or asked.only:
                said = "; ".join(row["problems"]) or row["line"]
                print(
                    f"{case.name} {row['status']} {row['cpu_s']}s {row['what']}: {said}"[:500],
                    flush=True,
                )

    with ThreadPoolExecutor(asked.at_once) as pool:
        list(pool.map(one, rest))
    command = f"python -m benchmarks.hostile --cases {asked.cases} --seed {asked.seed}"
    (asked.out / "hostile.md").write_text(summarise(rows, command))
    broken = sum(bool(r["problems"]) for r in rows)
    print(f"{len(rows)} of {len(cases)} cases, {broken} broken; {asked.out / 'hostile.md'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
