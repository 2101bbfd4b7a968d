"""Records of long runs stay small, and evaluations can be bounded."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import typer

import hybrid
from hybrid import cli
from hybrid.comparison import session
from hybrid.records import Comparison, Record, StepRecord, read
from hybrid.records.steps import MOST, bound, read_run, shorten, shorten_all, with_all_steps
from hybrid.report.table import make_legend
from hybrid.training.check import look_at_job
from hybrid.training.step_log import StepLog

from .conftest import JOBS, small_job


def fill(log: StepLog, count: int) -> None:
    """Add steps, whose loss is their number."""
    for step in range(count):
        log.add(StepRecord(step, float(step), 1.0, 0.1, 3, "0f"), {"seconds": 0.5})
        log.write(now=False)


@pytest.mark.parametrize("more", [0, 1, 337])
def test_a_list_has_the_first_and_the_last_entries(more: int) -> None:
    found, left_out = bound(iter(range(MOST + more)))
    assert left_out == more and len(found) == MOST
    assert found == [*range(MOST // 2), *range(MOST // 2 + more, MOST + more)]
    assert bound(range(7)) == ([*range(7)], 0)


def test_a_long_run_is_read_back_whole(tmp_path: Path) -> None:
    """What is written is small, what a comparison gets is all; a lost line is found."""
    log = StepLog(True, tmp_path)
    fill(log, 2 * MOST + 11)
    steps, left_out = log.all()
    assert len(steps) == MOST and left_out == {"steps": MOST + 11}
    short = Record("single", "ok", steps=steps, left_out=left_out)
    whole = with_all_steps(short, tmp_path)
    assert [step.step for step in whole.steps] == [*range(2 * MOST + 11)] and not whole.left_out
    assert shorten(whole) == short
    hybrid.records.write(shorten(whole), tmp_path / "record.json")
    assert read_run(tmp_path) == whole and read(Record, tmp_path / "record.json") == short
    kept = shorten_all(Comparison({}, {}, "single", {"single": whole}, {}, True))
    assert kept.strategies == {"single": short}
    lines = (tmp_path / "steps.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "steps.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="has 2010 of the 2011 steps of the record"):
        read_run(tmp_path)


def test_lines_are_written_a_few_times_a_second(tmp_path: Path) -> None:
    log = StepLog(True, tmp_path)
    fill(log, 5)
    file = tmp_path / "steps.jsonl"
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0]
    log.write()
    assert len(file.read_text().splitlines()) == 5


def test_an_evaluation_may_have_a_part_of_the_test_set(tmp_path: Path) -> None:
    """The first 24 of 37 samples under two strategies; more batches than there are warn."""
    job = small_job(train__eval_batches=1, train__steps=2)
    result = hybrid.compare(job, ["ddp"], 2, tmp_path)
    assert result.ok
    for run in result.strategies.values():
        assert run.eval and (run.eval.samples, run.eval.set_samples) == (24, 37)
    assert "first 24 of 37 test samples" in make_legend(result)
    assert "first 24 of 37 test samples" in (tmp_path / "compare.md").read_text()
    found = look_at_job(small_job(train__eval_batches=3)).warnings()
    assert found == ["train.eval_batches = 3: the test set has 2 batches; valid: 2 at most"]


def test_compare_prints_what_its_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [StepRecord(step, 1.0, 1.0, 0.1, 3, "0f") for step in range(MOST + 7)]
    result = Comparison({}, {}, "single", {"single": Record("single", "ok", steps=steps)}, {}, True)
    printed = io.StringIO()
    monkeypatch.setattr(session, "compare", lambda *_, **__: result)
    monkeypatch.setattr(cli, "_stdout", printed)
    with pytest.raises(typer.Exit):
        cli.compare(JOBS / "mlp.toml", out=tmp_path / "out", json=True)
    assert printed.getvalue() == hybrid.records.dumps(shorten_all(result)) + "\n"
    assert json.loads(printed.getvalue())["strategies"]["single"]["left_out"] == {"steps": 7}
