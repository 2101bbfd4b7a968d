"""A reference that does not repeat its bits is found, named and put aside; nobody votes on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid.comparison import runs as making
from hybrid.comparison.differences import Run
from hybrid.comparison.doubts import name_suspect, settle
from hybrid.comparison.parity import compare_runs
from hybrid.comparison.repeats import Trusted, find_trusted
from hybrid.records import Parity, Record

from .conftest import small_job
from .test_parity import at_steps, make_run, rule

GOOD, OFF = make_run(), at_steps([0, 1, 2], loss=1 + 1e-7)
FAR, FARTHER = at_steps([3], loss=1.1), at_steps([3], loss=1.2)


def trusted(**runs: Run) -> Trusted:
    known = {name: run.record for name, run in runs.items()}
    return find_trusted("single", known, lambda name: runs[name], rule())


def test_a_reference_that_repeats_its_bits_stands() -> None:
    assert trusted(single=GOOD) == Trusted(missing="single_again")
    assert trusted(single=GOOD, single_again=GOOD) == Trusted("single")
    assert trusted(single=GOOD, single_again=OFF) == Trusted(missing="single_third")


@pytest.mark.parametrize("off", ["single", "single_again"])
def test_a_third_run_decides(off: str) -> None:
    runs = {"single": GOOD, "single_again": GOOD, "single_third": GOOD} | {off: OFF}
    found = trusted(**runs)
    assert found.label in runs and found.label != off
    fault = found.fault
    assert fault is not None and (fault.step, fault.quantity, fault.runs) == (0, "loss", [off])
    assert fault.size == pytest.approx(1e-7)


def test_three_runs_that_all_differ_decide_nothing() -> None:
    found = trusted(single=GOOD, single_again=FAR, single_third=FARTHER)
    assert found.label is None and found.fault is not None
    assert (found.fault.step, found.fault.quantity) == (3, "loss")


def test_bits_that_always_differ_within_the_tolerance_are_no_fault() -> None:
    other = at_steps([0], loss=1 - 1e-7)
    assert trusted(single=GOOD, single_again=OFF, single_third=other) == Trusted("single")
    found = trusted(single=GOOD, single_again=FAR, single_third=OFF)
    assert found.label == "single" and found.fault and found.fault.runs == ["single_again"]


def test_a_run_that_failed_counts_as_off() -> None:
    failed = Run(dataclasses.replace(GOOD.record, status="failed"), {})
    found = trusted(single=GOOD, single_again=failed, single_third=GOOD)
    assert found.label == "single" and found.fault and found.fault.quantity == "status"


@pytest.mark.parametrize("off", ["single", "single_again"])
def test_the_run_that_was_off_gives_up_its_name_and_folder(off: str, tmp_path: Path) -> None:
    runs = {"single": GOOD, "single_again": GOOD, "single_third": GOOD} | {off: OFF}
    for name in runs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text("off" if name == off else "good")
    main, controls = {"single": runs["single"].record}, {n: runs[n].record for n in runs if n[6:]}
    fault = settle("single", main, controls, tmp_path, lambda name: runs[name], rule())
    assert fault is not None and fault.runs == ["single_off"]
    assert main["single"] == GOOD.record and controls["single_off"] == OFF.record
    folders = {path.parent.name: path.read_text() for path in tmp_path.glob("*/which")}
    assert folders == {"single": "good", "single_again": "good", "single_off": "off"}
    assert controls.keys() == {"single_again", "single_off"}


def test_a_run_moves_beside_what_a_tracker_and_a_person_keep_there(tmp_path: Path) -> None:
    runs = {"single": OFF, "single_again": GOOD, "single_third": GOOD}
    for name in runs:
        (tmp_path / name / "trackers" / f"events of {name}").mkdir(parents=True)
        (tmp_path / name / "steps.jsonl").write_text(name)
    kept = tmp_path / "single_off"  # by the comparison before, which had the same fault
    (kept / "trackers" / "events of then").mkdir(parents=True)
    for file in ("steps.jsonl", "mine.txt"):
        (kept / file).write_text("then")
    main, controls = {"single": OFF.record}, {n: GOOD.record for n in runs if n[6:]}
    assert settle("single", main, controls, tmp_path, lambda name: runs[name], rule())
    there = {path.name: path.read_text() for path in kept.iterdir() if path.is_file()}
    assert there == {"steps.jsonl": "single", "mine.txt": "then"}
    events = {path.name for path in (kept / "trackers").iterdir()}
    assert events == {"events of then", "events of single"}
    assert (tmp_path / "single" / "steps.jsonl").read_text() == "single_again"


def suspect(**runs: Run) -> dict[str, Parity]:
    """Verdicts on runs whose names begin with their engine's, against GOOD."""
    parity = {n: compare_runs(run, GOOD, "single", rule()) for n, run in runs.items()}
    return name_suspect(parity, "single", lambda n: n[0], lambda n: runs[n], rule())


def cause(parity: Parity) -> str:
    assert not parity.ok and parity.first_difference is not None
    return str(parity.first_difference.likely_cause)


def test_two_engines_that_agree_with_each_other_make_the_reference_suspect() -> None:
    wrong = at_steps(range(30, 40), loss=1.001)
    found = suspect(a1=wrong, b1=wrong)
    for parity in found.values():
        assert cause(parity).startswith("single itself is suspect: a1 and b1, of different engines")
    assert cause(suspect(a1=wrong, a2=wrong)["a1"]) == "None", "two runs of one engine"
    assert cause(suspect(a1=wrong, b1=FAR)["a1"]) == "None", "they do not agree"
    half = at_steps(range(40), grad_norm=0.5)
    assert "divided twice" in cause(suspect(a1=half, b1=half)["a1"])
    assert "; or single itself is suspect" in cause(suspect(a1=half, b1=half)["a1"])


def plant(monkeypatch: pytest.MonkeyPatch, **by: float) -> None:
    """Multiply the losses of runs by these factors, from step 1 on, after they have ended."""
    launch = making.launch

    def off(
        job: Any, name: str, nproc: int, out: Path, watcher: Any, label: str, *rest: Any, **how: Any
    ) -> Record:
        record = launch(job, name, nproc, out, watcher, label, *rest, **how)
        if label not in by:
            return record
        steps = [
            dataclasses.replace(s, loss=s.loss * (by[label] if s.step else 1)) for s in record.steps
        ]
        record = dataclasses.replace(record, steps=steps)
        hybrid.records.write(record, out / "record.json")
        return record

    monkeypatch.setattr(making, "launch", off)


def test_single_that_is_off_once_is_told_and_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, single=1 + 1e-5)
    result = hybrid.compare(small_job(), ["ddp"], 2, tmp_path)
    fault = result.reference_fault
    assert result.ok and fault is not None
    assert (fault.step, fault.quantity, fault.runs) == (1, "loss", ["single_off"])
    assert result.parity["ddp"].state == result.parity["single"].state == "equal"
    assert (tmp_path / "single_off" / "record.json").exists()


def test_single_that_is_always_off_stays_the_reference_and_is_suspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, single=1 + 1e-5, single_again=1 + 1e-5)
    result = hybrid.compare(small_job(), ["ddp", "pipeline"], 2, tmp_path)
    assert not result.ok and result.reference_fault is None
    for name in ("ddp", "pipeline"):
        assert "single itself is suspect" in cause(result.parity[name])
    assert result.controls.keys() == {
        "single_again",
        "single_of_2_cut_2",  # threads as those of a rank
        "single_of_2_cut_4",
    }


def test_a_strategy_that_is_off_stays_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, ddp=1 + 1e-5)
    result = hybrid.compare(small_job(), ["ddp"], 2, tmp_path)
    assert not result.ok and result.reference_fault is None
    assert result.parity["ddp"].state == "not_equal"


def test_a_reference_whose_runs_all_differ_leaves_it_undecided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, single=1.1, single_again=1.2, single_third=1.3)
    result = hybrid.compare(small_job(), ["ddp"], 2, tmp_path)
    assert not result.ok and result.parity["ddp"].state == "not_decided"
    assert result.reference_fault is not None
    assert result.reference_fault.runs == ["single", "single_again", "single_third"]
