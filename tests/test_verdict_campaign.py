"""The campaign of benchmarks/verdicts.py: a few of its jobs and faults, and how it counts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

import hybrid
from benchmarks import verdicts
from benchmarks.verdict_campaign import campaign, page
from benchmarks.verdict_campaign.draw import draw_fault, draw_job
from benchmarks.verdict_campaign.effect import FinishedRun, measure_effect
from benchmarks.verdict_campaign.kinds import KINDS
from hybrid.records import EvalResult, Record, StepRecord, Weights
from hybrid.strategies import registry


@pytest.mark.parametrize("seed", [29, 32])
def test_right_jobs_are_called_equal(seed: int, tmp_path: Path) -> None:
    row = campaign.run_job(seed, tmp_path)
    assert row["outcome"] == "equal", page.line(row)
    assert list(row["verdicts"]) == ["single", *draw_job(seed).strategies]
    assert row["folder"] is None and not list((tmp_path / "jobs").iterdir())
    json.dumps(row)


@pytest.mark.parametrize("seed", [57, 82])
def test_planted_faults_are_caught(seed: int, tmp_path: Path) -> None:
    row = campaign.run_fault(seed, tmp_path)
    assert row["outcome"] == "caught", page.line(row)
    assert row["effect"]["visible"] > 1, row
    json.dumps(row)


def test_a_fault_that_changes_nothing_is_invisible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is scaled by 1: the run is right in every bit, and nothing is caught."""
    drawn = draw_fault(list(KINDS).index("loss_scaled"))
    fault = dataclasses.replace(drawn.fault, size=1.0, strategy="ddp", step=0, once=False)
    job = dataclasses.replace(drawn.job, strategies=("ddp",), nproc=2)
    nothing = dataclasses.replace(drawn, fault=fault, job=job)
    monkeypatch.setattr(campaign, "draw_fault", lambda seed: nothing)
    row = campaign.run_fault(0, tmp_path)
    assert row["outcome"] == "invisible" and row["verdict"] == "equal", page.line(row)
    assert row["effect"]["size"] == 0.0


def test_a_seed_always_draws_the_same() -> None:
    assert draw_job(5) == draw_job(5) != draw_job(6)
    assert draw_fault(5) == draw_fault(5) != draw_fault(5 + len(KINDS))


def test_draws_are_jobs_and_reach_every_place() -> None:
    jobs = [draw_job(seed) for seed in range(300)]
    faults = [draw_fault(seed) for seed in range(100)]
    for drawn in [*jobs, *(f.job for f in faults)]:
        assert not hybrid.load_job(drawn.sections).warnings() or drawn in jobs
    steps = [drawn.sections["train"]["steps"] for drawn in jobs]
    assert min(steps) == 1 and max(steps) == 60
    every = set(registry.NAMES) - {"single"}
    assert {name for drawn in jobs for name in drawn.strategies} == every
    assert {f.fault.strategy for f in faults} == every
    assert {f.fault.kind for f in faults} == set(KINDS)
    assert sum(f.fault.step > 20 for f in faults) >= 10
    assert sum(f.fault.step == 11 == f.job.sections["train"]["steps"] - 1 for f in faults) >= 5


def test_every_kind_can_be_planted() -> None:
    from benchmarks.verdict_campaign.planted import PLANTS

    assert PLANTS.keys() == KINDS.keys()


def _finished(loss: float, weight: float) -> FinishedRun:
    steps = [StepRecord(0, loss, 1.0, 0.1, 8, "00")]
    evaluation = EvalResult(loss, 8)
    record = Record("ddp", "ok", steps=steps, eval=evaluation, weights=Weights({"w": 1.0}, {}))
    return FinishedRun(record, {"w": numpy.array([weight, 0.5], "float32")})


@pytest.mark.parametrize(
    ("precision", "loss", "weight", "visible"),
    [
        ("fp32", 1.0, 1.0, False),
        ("fp32", 1 + 7e-7, 1.0, False),  # below what sums in fp32 round
        ("fp32", 1 + 3e-6, 1.0, True),
        ("fp32", 1.0, 1 + 3e-5, False),  # below four times what the right run is off
        ("fp32", 1.0, 1 + 6e-5, True),
        ("bf16", 1 + 7e-4, 1.0, False),
        ("bf16", 1 + 2e-3, 1.0, True),
        ("bf16", 1.0, 1 + 3e-4, False),  # an update of 0.1, rounded by 0.004
        ("bf16", 1.0, 1 + 5e-4, True),
    ],
)
def test_an_effect_is_visible_above_rounding(
    precision: str, loss: float, weight: float, visible: bool
) -> None:
    right, reference = _finished(2.0, 1.0), _finished(2.0, 1 + 1e-5)
    start = {"w": numpy.array([0.9, 0.4], "float32")}
    faulty = _finished(2.0 * loss, weight)
    found = measure_effect(faulty, right, [reference], start, precision)
    assert (found.visible > 1) == visible, found


def _row(seed: int, outcome: str, **more: Any) -> dict[str, Any]:
    sections = {"train": {"precision": "fp32"}}
    base = {"seed": seed, "job": "a job", "sections": sections, "outcome": outcome, "seconds": 1.0}
    return base | {"verdicts": {"single": "equal", "ddp": "equal"}, "reasons": {}} | more


def test_rows_are_read_back_and_those_that_count_are_counted(tmp_path: Path) -> None:
    ran: list[int] = []

    def run(seed: int, out: Path) -> dict[str, Any]:
        ran.append(seed)
        return _row(seed, "diverged" if seed == 1 else "equal")

    file = tmp_path / "jobs.jsonl"
    verdicts.run_until(run, file, tmp_path, 2, 0, page.job_counts)
    assert ran == [0, 1, 2]  # another one for the job that diverged
    file.write_text(file.read_text() + '{"seed": 3, "outc')
    rows = verdicts.run_until(run, file, tmp_path, 3, 0, page.job_counts)
    assert ran == [0, 1, 2, 3] and [row["seed"] for row in rows] == [0, 1, 2, 3]
    assert verdicts.run_until(run, file, tmp_path, 3, 0, page.job_counts) == rows
    assert ran == [0, 1, 2, 3]


def test_the_page_names_what_was_wrong() -> None:
    fault = dataclasses.asdict(draw_fault(1).fault)
    effect = {"place": "loss of 3", "size": 1e-3, "rounding": 1e-6, "visible": 1e3}
    first = {"step": 3, "quantity": "loss", "got": 1.5, "expected": 1.25, "likely_cause": None}
    jobs = [_row(0, "equal"), _row(7, "alarm", first={"ddp": first}), _row(8, "diverged")]
    jobs[1]["verdicts"] = {"single": "equal", "ddp": "not_equal"}
    planted = {"fault": fault, "late": True, "effect": effect}
    faults = [_row(0, "caught", first={fault["strategy"]: first}, **planted)]
    faults += [_row(9, "missed", **planted), _row(4, "invisible", **planted)]
    text = page.markdown(jobs, faults, "python -m benchmarks.verdicts", "a machine")
    assert "- 2 comparisons of random small jobs, all of them right: **1 false alarms**" in text
    assert "- 2 planted faults, 2 of them in the last step or after step 20: **1 called" in text
    assert "| `ddp` | 1 of 2 |" in text
    for title, seed in (("False alarms", 7), ("Faults that were called equal", 9)):
        section = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
        assert section.strip().startswith(f"- {seed} "), section
    assert "loss of step 3, 1.5 for 1.25" in text


@pytest.mark.parametrize(
    ("verdicts_found", "outcome"),
    [
        (["equal", "equal", "not possible"], "equal"),
        (["equal", "equal", "not_equal"], "alarm"),
        (["equal", "equal", "not_decided"], "alarm"),
        (["equal", "failed", "diverged"], "alarm"),
        (["not_compared", "equal"], "alarm"),
        (["diverged", "diverged"], "diverged"),
        (["equal", "not possible"], "nothing ran"),
    ],
)
def test_a_right_job_with_any_other_verdict_is_an_alarm(
    verdicts_found: list[str], outcome: str
) -> None:
    named = {str(i): verdict for i, verdict in enumerate(verdicts_found)}
    assert campaign._outcome(named) == outcome
