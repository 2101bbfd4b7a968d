"""Known failures of released software, each shown to be caught: a gallery.

    python -m benchmarks.known_failures --json > known_failures.json
    python -m benchmarks.known_failures > benchmarks/known_failures.md

Run from the top folder. Each release that trains wrongly is installed by pip in a folder of its
own, beside the good one, and `hybrid compare` runs a small job that shows the failure on both. With
the bad release the comparison must find it in the right step and quantity; with the good one it
must raise no alarm. Exit status: 0 if all of it is so, 1 otherwise.

With `--release newest` (or a number) each job that tries DeepSpeed runs under that release alone.
An alarm is then a failure that is back, unless no earlier release has been without it again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gallery.releases import NEWEST, InstallError, install, release_in
from .gallery.rows import ROWS, Row
from .gallery.running import Outcome, run_row
from .machine import summarise_machine

NOTES = """
- A release of DeepSpeed is installed by pip in a folder of its own, which is first on PYTHONPATH.
- Two rows lift this project's work-around: clipping by the first stage's norm, and FSDP. MKL's
  failure is planted: half of the first tanh of each `ddp` rank is right to 12 bits alone.
- ZeRO-1 on 0.18.9: the run refused itself, since its ranks had different norms. What was expected
  is rank 0's. That release lacks an attribute of its optimizer, which the gallery gives it.
- `zero0_bf16` and `own_file` are strategies of one's own, in `benchmarks/gallery/`.
"""


def check_row(row: Row, out: Path, cache: Path) -> dict[str, Any]:
    """Run a row's job with the failure and without it, and return its object of the result."""
    bad = _try(row, row.release, row.planted or row.adapter, out / "bad", cache)
    good = _try(row, row.good if row.release else None, row.mended, out / "good", cache)
    in_place = (bad.step, bad.quantity) == (row.step, row.quantity)
    named = row.cause is None or row.cause in (bad.likely_cause or "")
    return {
        "name": row.name,
        "release": row.shown_release,
        "strategy": row.strategy,
        "report": row.report,
        "caught": bad.alarm and in_place and named,
        "step": bad.step,
        "quantity": bad.quantity,
        "got": bad.got,
        "expected": bad.expected,
        "likely_cause": bad.likely_cause,
        "control": describe_control(row),
        "control_ok": not good.alarm and good.problem is None,
        "known_bad_allowed": bad.known_bad_allowed,
        "problems": [found for found in (bad.problem, good.problem) if found],
    }


def describe_control(row: Row) -> str:
    """Say what the same job runs with where it must raise no alarm."""
    if row.planted:
        return "with this project's work-around"
    return f"{row.subject} {row.good}"


def _try(row: Row, release: str | None, planted: str | None, out: Path, cache: Path) -> Outcome:
    try:
        return run_row(row, release, planted, out, cache)
    except (InstallError, OSError, subprocess.SubprocessError) as error:
        return Outcome(False, problem=str(error))


def try_release(row: Row, release: str, out: Path, cache: Path) -> dict[str, Any]:
    """Run a row's job under another release of DeepSpeed, and return its object of the result.

    `still_there`: the failure shows, and did in the newest release that was known when the row was
    written."""
    found = _try(row, release, None, out, cache)
    still_there = found.alarm and row.unmended
    return {
        "name": row.name,
        "release": f"DeepSpeed {release}",
        "strategy": row.strategy,
        "ok": found.problem is None and (still_there or not found.alarm),
        "still_there": still_there,
        "step": found.step,
        "quantity": found.quantity,
        "likely_cause": found.likely_cause,
        "problems": [found.problem] if found.problem else [],
    }


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Write the result as the page that benchmarks/known_failures.md is."""
    lines = [
        "# Known failures, and what a comparison says about them\n",
        f"Two processes, gloo, four steps of SGD. {summarise_machine()}.",
        "Command: `python -m benchmarks.known_failures`. Each row is one failure of",
        "released software: `hybrid compare` of a small job that shows it, and of the same job",
        "without it.\n",
        "| failure | in | strategy | reported | caught | step | quantity | got / expected "
        "| likely cause | without it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        values = f"{_number(row['got'])} / {_number(row['expected'])}"
        said = "; ".join(row["problems"]) or row["likely_cause"] or "none named"
        cells = [row["name"], row["release"], row["strategy"].rpartition(".")[2], row["report"]]
        cells += ["yes" if row["caught"] else "**no**", str(row["step"]), str(row["quantity"])]
        cells += [
            values,
            said,
            f"{row['control']}: {'equal' if row['control_ok'] else '**alarm**'}",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    caught, quiet = (sum(row[key] for row in rows) for key in ("caught", "control_ok"))
    lines.append(f"\n{caught} of {len(rows)} caught, {len(rows) - quiet} alarms without a failure.")
    return "\n".join([*lines, NOTES])


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def run_all(rows: Sequence[Row], release: str | None, out: Path, cache: Path) -> list[Any]:
    """Run the rows one by one, with a word on stderr after each."""
    found: list[dict[str, Any]] = []
    if release:
        place = install(release, cache)
        release = release_in(place) if place else release
        rows = [row for row in rows if row.release and not row.planted]
    for row in rows:
        folder = out / re.sub(r"\W+", "-", row.name)
        if release:
            found.append(try_release(row, release, folder, cache))
        else:
            found.append(check_row(row, folder, cache))
        state = "as it should be" if is_right(found[-1]) else f"NOT as it should be: {found[-1]}"
        print(f"{row.name}: {state}", file=sys.stderr, flush=True)
    return found


def is_right(row: dict[str, Any]) -> bool:
    """Tell whether a row's result is what it must be."""
    return row["ok"] if "ok" in row else row["caught"] and row["control_ok"]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.known_failures")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name this finds")
    parser.add_argument("--cache", type=Path, help="where releases stay for the next time")
    parser.add_argument("--out", type=Path, help="where the comparisons stay")
    parser.add_argument("--release", help=f"try this release alone, such as 0.20.0, or {NEWEST}")
    return parser


def main() -> None:
    """Run the rows that are asked for, and print the result."""
    arguments = make_parser().parse_args()
    rows = [
        row for row in ROWS if re.search(arguments.only, f"{row.name} {row.release} {row.report}")
    ]
    with tempfile.TemporaryDirectory() as folder:
        cache = (arguments.cache or Path(folder) / "releases").absolute()
        out = (arguments.out or Path(folder) / "runs").absolute()
        found = run_all(rows, arguments.release, out, cache)
    if arguments.json or arguments.release:
        print(json.dumps({"rows": found}, indent=1))
    else:
        print(as_markdown(found))
    sys.exit(0 if found and all(map(is_right, found)) else 1)


if __name__ == "__main__":
    main()
