"""Kills ranks of runs that save their state, has the runs go on, and counts what was lost.

    python -m benchmarks.checkpoint_kills --out DIR [--phases 96] [--instants 200]
    python -m benchmarks.checkpoint_kills --out DIR --faults 200 --every 15      # the soak alone

Run from the top folder; the first takes about an hour on two cores, the second 50 minutes.
`--phases`: a rank is killed while it loads a checkpoint, in a step, in an evaluation, while it
saves, over strategy x rank x phase. `--instants`: while a file is written, just before and after
the commit, in pruning, in replacing a checkpoint of the same step. Then the run goes on with
`--resume auto`. Every other run saves asynchronously. `--faults`: benchmarks/checkpoint_soak.py.

DIR/cases.jsonl has a row for each case, and a second start goes on behind them. DIR/kills.md has
the counts; the folder of a case in which something was wrong stays."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hybrid.launch.warm import warm_ranks
from hybrid.strategies import registry

from .checkpoint_soak import soak
from .kill_cases import Row, draw_instant, draw_phase, run_case, usable
from .machine import summarise_machine


def read_rows(file: Path) -> list[Row]:
    """Return the whole lines of a file of rows."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def campaign(given: Any, file: Path) -> tuple[list[Row], dict[str, str]]:
    """Run the cases that `file` does not have yet; return all rows, and what could not run."""
    asked = given.strategies.split(",") if given.strategies else registry.NAMES
    references, why_not = usable(asked, given.out / "references")
    names = list(references)
    cases = [draw_phase(number, names) for number in range(given.phases)]
    wanted, number = given.instants, 0
    rows = read_rows(file)
    known = {row["what"]: row for row in rows}
    while cases or wanted > 0:
        if cases:
            case, counts = cases.pop(0), False
        else:
            case, counts, number = draw_instant(number, names), True, number + 1
        row = known.get(f"{case.number}: {case.words()}")
        if row is None:
            out = given.out / f"{case.kind}-{case.number}"
            row = run_case(case, references[case.strategy], out)
            row["what"] = f"{case.number}: {case.words()}"
            rows.append(row)
            if not row["problems"]:
                shutil.rmtree(out)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(show(row), file=sys.stderr, flush=True)
        wanted -= counts and row["reached"]
    return rows, why_not


def show(row: Row) -> str:
    """Return a row as a line."""
    end = "; ".join(row["problems"]) or "exact"
    end = end if row["reached"] else f"not reached; {end}"
    return f"{row['what']}: {row['lost']} steps lost, {end} ({row['seconds']:.0f} s)"


def markdown(rows: list[Row], why_not: dict[str, str], laps: list[Row]) -> str:
    """Write the counts, and every case in which something was wrong."""
    lines = [
        "# Kills of runs that save their state",
        "",
        f"`python -m benchmarks.checkpoint_kills {' '.join(sys.argv[1:])}`: {summarise_machine()}.",
        "",
    ]
    reached = [row for row in rows if row["reached"]]
    if reached:
        lines += [
            "| killed in | cases | exact | most steps lost, synchronous | asynchronous |",
            "|---|---:|---:|---:|---:|",
        ]
    for kind, count in Counter(row["kind"] for row in reached).items():
        mine = [row for row in reached if row["kind"] == kind]
        most = [
            max((row["lost"] for row in mine if ("asynchronous" in row["what"]) == x), default=0)
            for x in (False, True)
        ]
        exact = sum(not row["problems"] for row in mine)
        lines.append(f"| {kind} | {count} | {exact} | {most[0]} | {most[1]} |")
    if reached:
        lines += [
            "",
            f"Saved every 3 of 12 steps, the newest 2 kept. {len(rows) - len(reached)} cases more "
            "were drawn whose instant their run did not reach. In `replacing` a finished run goes "
            "on from an earlier step of its own.",
        ]
    lines += [f"- {name} could not run: {reason}" for name, reason in why_not.items()]
    for lap in laps:
        faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(lap["faults"].items()))
        end = "; ".join(lap["problems"]) or "exact, nothing lost or left"
        lines.append(f"- soak, {lap['strategy']}, {lap['steps']} steps: {faults}: {end}")
    wrong = [f"- {show(row)}" for row in rows if row["problems"]]
    wrong += [f"- no run reached an instant in {kind}" for kind in never_reached(rows)]
    lines += ["", "Wrong:", "", *wrong] if wrong else []
    return "\n".join([*lines, ""])


def never_reached(rows: list[Row]) -> set[str]:
    """Return the kinds of which no kill took place: the accident is planted where nothing runs."""
    return {row["kind"] for row in rows} - {row["kind"] for row in rows if row["reached"]}


def main() -> None:
    """Run what was asked for, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phases", type=int, default=96, help="ranks killed by phase")
    parser.add_argument("--instants", type=int, default=200, help="ranks killed in a save")
    parser.add_argument("--strategies", help="names with commas; left out, all")
    parser.add_argument("--faults", type=int, default=0, help="of the soak, which then runs alone")
    parser.add_argument("--every", type=float, default=15, help="seconds between two of them")
    parser.add_argument("--seed", type=int, default=0, help="of the soak")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows, why_not, laps = list[Row](), dict[str, str](), list[Row]()
    with warm_ranks():
        if given.faults:
            laps = soak(given)
        else:
            rows, why_not = campaign(given, given.out / "cases.jsonl")
    page = markdown(rows, why_not, laps)
    (given.out / ("soak.md" if laps else "kills.md")).write_text(page)
    print(page)
    bad = any(row["problems"] for row in [*rows, *laps]) or bool(never_reached(rows))
    raise SystemExit(bad)


if __name__ == "__main__":
    main()
