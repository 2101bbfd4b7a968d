"""Runs one comparison of the gallery, and reads from compare.json whether it raised an alarm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .releases import install
from .rows import Row

ROOT = Path(__file__).parents[2]
NPROC = 2
RUN_S = 300  # a comparison of two small runs that takes longer hangs


class Outcome(NamedTuple):
    """What one comparison found; `problem` says why it found nothing that counts.

    step, quantity, got, expected, likely_cause: of the first difference. A run that its own receipt
    refused has the quantity "receipt", and the reason as its likely cause."""

    alarm: bool
    step: int | None = None
    quantity: str | None = None
    got: Any = None
    expected: Any = None
    likely_cause: str | None = None
    problem: str | None = None
    deepspeed: str | None = None
    known_bad_allowed: bool | None = None


REFUSED = "receipt refused: "
# What a run says of itself where its ranks disagree on a number that all of them share.
DISAGREE = re.compile(
    r"rank \d+ has (?P<what>gradient norm|learning rate) (?P<got>\S+), rank 0 has (?P<first>\S+): "
    r"(?P<cause>.*) \(in step (?P<step>\d+)\)"
)
QUANTITIES = {"gradient norm": "grad_norm", "learning rate": "lr"}


def read_outcome(comparison: dict[str, Any], strategy: str) -> Outcome:
    """Return what a comparison (the object of compare.json) says about one strategy.

    A run that refused itself is an alarm: by its receipt, or because its ranks disagree on a number
    (`got`, and `expected` on rank 0). A run that failed of something else is none but a problem: a
    crash proves nothing about what was computed."""
    record, verdict = comparison["strategies"][strategy], comparison["parity"].get(strategy)
    reason = record.get("reason") or ""
    # A run that failed has no environment in its record.
    about = {
        "deepspeed": comparison["machine"].get("packages", {}).get("deepspeed"),
        "known_bad_allowed": comparison["job"].get("launch", {}).get("allow_known_bad"),
    }
    if record["status"] == "failed" and REFUSED in reason:
        cause = reason.partition("; ")[2] or reason
        return Outcome(True, None, "receipt", "refused", "engaged", cause, None, **about)
    if record["status"] == "failed" and (found := DISAGREE.search(reason)):
        values = float(found["got"]), float(found["first"])
        what = QUANTITIES[found["what"]]
        return Outcome(True, int(found["step"]), what, *values, found["cause"], None, **about)
    if record["status"] != "ok" or verdict is None:
        return Outcome(False, problem=f"{record['status']}: {reason}", **about)
    if verdict["state"] not in ("equal", "not_equal"):
        return Outcome(False, problem=f"the verdict is {verdict['state']}", **about)
    if fault := comparison.get("reference_fault"):
        return Outcome(False, problem=f"the reference does not repeat: {fault}", **about)
    first = verdict["first_difference"]
    if verdict["ok"]:
        return Outcome(False, **about)
    step, what, *values = (first[key] for key in ("step", "quantity", "got", "expected"))
    return Outcome(True, step, what, *values, first["likely_cause"], None, **about)


def run_row(row: Row, release: str | None, planted: str | None, out: Path, cache: Path) -> Outcome:
    """Compare the row's strategy with `single`, under a release of DeepSpeed, and read the outcome.

    release: None for the installed one. planted: a failure of `planted.py`, or None. Every rank is
    started afresh, since a warm process would have imported one DeepSpeed for all."""
    folder = install(release, cache) if release else None
    out.mkdir(parents=True, exist_ok=True)
    job = out / "job.json"
    job.write_text(json.dumps(row.job))
    program = ["benchmarks.gallery.planted", planted] if planted else ["hybrid"]
    command = [sys.executable, "-m", *program, "compare", str(job), "--strategies", row.strategy]
    command += ["--nproc", str(NPROC), "--out", str(out), "--fresh-ranks", "--allow-known-bad"]
    paths = [str(folder)] if folder else []
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)])},
        cwd=out,
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    (out / "command.log").write_text(done.stdout + done.stderr)
    file = out / "compare.json"
    if done.returncode not in (0, 1) or not file.exists():
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return Outcome(False, problem=f"the command ended with {done.returncode}: {last}")
    outcome = read_outcome(json.loads(file.read_text()), row.strategy)
    if release and outcome.deepspeed not in (release, None):
        return outcome._replace(alarm=False, problem=f"DeepSpeed {outcome.deepspeed} ran instead")
    return outcome
