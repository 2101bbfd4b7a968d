"""Runs the drawn jobs and the planted faults, and says of each whether the verdict was right.

Each gives one row, a JSON object, which `page` counts. Folders of right verdicts are removed."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import hybrid
from hybrid.launch.local import Program
from hybrid.records import Comparison, Record
from hybrid.training.check import check_job

from .draw import DrawnFault, DrawnJob, draw_fault, draw_job, to_text
from .effect import load_run, measure_effect

Row = dict[str, Any]
PLANTED = ("-m", f"{__package__}.planted")
NOT_FINITE = "not finite"
EMULATION = "local_sgd_emulation"


def run_job(seed: int, out: Path, keep: bool = False) -> Row:
    """Compare the job of a seed, which must be called equal.

    The row's `outcome` is `equal`, `alarm` (the folder stays), `diverged` or `nothing ran`. keep:
    keep the folder in any case."""
    drawn, folder, begun = draw_job(seed), out / "jobs" / f"{seed:04}", time.monotonic()
    row: Row = {"seed": seed, "job": drawn.describe(), "sections": drawn.sections}
    try:
        result = _compare(drawn, folder)
    except hybrid.JobError as error:
        row |= {"outcome": "refused", "reason": str(error), "verdicts": {}}
    else:
        verdicts = {name: _verdict(result, name) for name in result.strategies}
        row |= {"outcome": _outcome(verdicts), "verdicts": verdicts}
        row |= {"controls": sorted(result.controls)} | _what_was_off(result, verdicts)
    row["seconds"] = round(time.monotonic() - begun, 2)
    return _finished(row, folder, keep or row["outcome"] in ("alarm", "refused"))


def _compare(drawn: DrawnJob, folder: Path, program: Program | None = None) -> Comparison:
    """Compare without a word on the screen."""
    job = hybrid.load_job(drawn.sections)
    with contextlib.redirect_stderr(io.StringIO()):
        return hybrid.compare(job, drawn.strategies, drawn.nproc, folder, program=program)


def _finished(row: Row, folder: Path, keep: bool) -> Row:
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return row | {"folder": str(folder) if keep else None}


def _verdict(result: Comparison, name: str) -> str:
    """Say in a word how the comparison ended for one strategy."""
    record = result.strategies[name]
    if record.status == "not_possible":
        return "not possible"
    if result.parity[name].ok:
        return "equal"
    known = [result.strategies[result.reference], result.controls.get(EMULATION)]
    if name == "local_sgd":  # another algorithm, which may diverge alone
        known.append(record)
    if any(_diverged(run) for run in known if run):
        return "diverged"
    return "failed" if record.status == "failed" else result.parity[name].state


def _diverged(record: Record) -> bool:
    return record.status == "failed" and NOT_FINITE in (record.reason or "")


def _outcome(verdicts: dict[str, str]) -> str:
    """Judge a right job by its strategies' verdicts; the reference is one of them."""
    found = set(verdicts.values())
    if found - {"equal", "diverged", "not possible"}:
        return "alarm"
    if "diverged" in found:
        return "diverged"
    compared = [name for name, verdict in verdicts.items() if verdict == "equal"]
    return "equal" if len(compared) > 1 else "nothing ran"


def _what_was_off(result: Comparison, verdicts: dict[str, str]) -> Row:
    """Return why each strategy failed or could not run, and where it differed first."""
    reasons = {n: r.reason for n, r in result.strategies.items() if r.reason}
    first = {
        name: dataclasses.asdict(found)
        for name in verdicts
        if name in result.parity and (found := result.parity[name].first_difference)
    }
    excused = {n: len(p.excused) for n, p in result.parity.items() if p.excused}
    return {"reasons": reasons, "first": first, "excused": excused}


def run_fault(seed: int, out: Path, keep: bool = False) -> Row:
    """Compare a right and a faulty run of the fault of a seed; the faulty one must not be equal.

    The row's `outcome` is `caught` (by the verdict), `refused` (by the run itself), `missed`,
    `invisible` (the fault changed nothing that could be measured), `no base` (the right run was not
    called equal, so that the fault was not run) or `broken` (the fault made the run crash)."""
    drawn, folder, begun = draw_fault(seed), out / "faults" / f"{seed:04}", time.monotonic()
    row: Row = {"seed": seed, "job": drawn.job.describe(), "sections": drawn.job.sections}
    row |= {"fault": dataclasses.asdict(drawn.fault), "late": drawn.is_late()}
    strategy = drawn.fault.strategy
    right = _compare(drawn.job, folder / "right")
    if _verdict(right, strategy) != "equal":
        first = _what_was_off(right, {strategy: ""})
        row |= {"outcome": "no base", "verdict": _verdict(right, strategy)} | first
    else:
        program = [sys.executable, *PLANTED, to_text(drawn.fault)]
        try:
            wrong = _compare(drawn.job, folder / "faulty", program)
        except hybrid.JobError as error:
            row |= {"outcome": "broken", "reason": str(error)}
        else:
            row |= _judge_fault(drawn, wrong, right, folder)
    row["seconds"] = round(time.monotonic() - begun, 2)
    return _finished(row, folder, keep or row["outcome"] in ("missed", "broken", "no base"))


def _judge_fault(drawn: DrawnFault, wrong: Comparison, right: Comparison, folder: Path) -> Row:
    """Say how a faulty run ended, and how far the fault moved it."""
    strategy = drawn.fault.strategy
    record, parity = wrong.strategies[strategy], wrong.parity[strategy]
    row: Row = {"verdict": _verdict(wrong, strategy), "controls": sorted(wrong.controls)}
    row |= _what_was_off(wrong, {strategy: ""})
    if record.status != "ok":
        return row | {"outcome": "refused" if "RunError" in (record.reason or "") else "broken"}
    # One that is cut alike can have the same bits as the right run, and shows no rounding then.
    # Between merges, local SGD is another algorithm than the comparison's reference.
    references = {right.parity[strategy].reference}
    if strategy != "local_sgd":
        references.add(right.reference)
    effect = measure_effect(
        load_run(folder / "faulty" / strategy),
        load_run(folder / "right" / strategy),
        [load_run(folder / "right" / name) for name in sorted(references)],
        _start(drawn.job),
        drawn.job.sections["train"]["precision"],
    )
    outcome = "missed" if parity.ok else "caught"
    outcome = outcome if effect.visible > 1 else "invisible"
    return row | {"outcome": outcome, "effect": dataclasses.asdict(effect)}


def _start(drawn: DrawnJob) -> dict[str, Any]:
    """Make the weights before training, as numpy arrays by name."""
    layers, _ = hybrid.build_model(check_job(hybrid.load_job(drawn.sections)).job)
    return {name: tensor.detach().numpy().copy() for name, tensor in layers.tensors().items()}
