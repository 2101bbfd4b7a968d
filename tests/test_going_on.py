"""A run goes on from its newest whole checkpoint, says what it does, and loses nothing saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid import records
from hybrid.checkpoint.folders import list_checkpoints
from hybrid.job.errors import JobError
from hybrid.job.recovery import Checkpoint
from hybrid.records import Record
from hybrid.training.run import run_job
from tests.conftest import small_job


def job(**changes: Any) -> Any:
    return small_job(**{"checkpoint__every": 2, "train__steps": 5, **changes})


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of five steps; copy it to change it."""
    out = tmp_path_factory.mktemp("ended") / "run"
    hybrid.train(job(), "single", out)
    return out


@pytest.fixture
def out(ended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "run"))


def killed(out: Path, after: int) -> None:
    """Leave the folder as if the run had been killed after so many steps."""
    for folder in list_checkpoints(out / "checkpoints"):
        if int(folder.name[5:]) > after:
            shutil.rmtree(folder)
    shutil.rmtree(out / "checkpoints" / "final")
    lines = (out / "steps.jsonl").read_text().splitlines(keepends=True)
    (out / "steps.jsonl").write_text("".join(lines[:after]) + lines[after][:10])
    record = records.read(Record, out / "record.json")
    records.write(Record(record.strategy, "running"), out / "record.json")


def contents(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file() and "logs" not in path.parts)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def steps_of(record: Record) -> list[tuple[int, float]]:
    return [(step.step, step.loss) for step in record.steps]


def test_a_killed_run_ends_as_if_it_had_not_been(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = records.read(Record, out / "record.json")
    killed(out, after=4)
    after = hybrid.train(job(), "single", out, resume="auto")
    assert steps_of(after) == steps_of(before) and after.checkpoint == before.checkpoint
    assert after.resumed_from and after.resumed_from.step == 4
    assert f"hybrid: goes on from {out}/checkpoints/step-00000004" in capsys.readouterr().err
    assert len((out / "steps.jsonl").read_text().splitlines()) == 5


def test_a_run_that_lacks_its_record_alone_makes_no_step(out: Path) -> None:
    before = records.read(Record, out / "record.json")
    records.write(Record("single", "running"), out / "record.json")
    after = hybrid.train(job(), "single", out, resume="auto")
    assert (
        after.status == "ok" and after.eval == before.eval and steps_of(after) == steps_of(before)
    )
    (out / "steps.jsonl").unlink()
    records.write(Record("single", "running"), out / "record.json")
    after = hybrid.train(job(), "single", out, resume="auto")
    assert (after.steps, after.eval) == ([], before.eval)


@pytest.mark.parametrize("resume", ["auto", "out"])
def test_a_run_that_has_ended_is_left_as_it_is(
    resume: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(out)
    record = hybrid.train(job(), "single", out, resume=out if resume == "out" else "auto")
    assert record == records.read(Record, out / "record.json") and contents(out) == before
    said = f"hybrid: {out}: the run has ended well, after 5 steps; nothing is left to do\n"
    assert capsys.readouterr().err == said


def test_more_steps_go_on_from_the_end(out: Path) -> None:
    longer = hybrid.train(job(train__steps=7), "single", out, resume="auto")
    assert [n for n, _ in steps_of(longer)] == list(range(7))
    assert longer.resumed_from and longer.resumed_from.step == 5


def test_without_a_checkpoint_it_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = hybrid.train(job(), "single", tmp_path, resume="auto")
    said = f"--resume auto: {tmp_path} has no checkpoint; the run starts at step 0"
    assert said in capsys.readouterr().err and record.resumed_from is None


def test_what_is_damaged_is_skipped_and_said(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed(out, after=4)
    newest, older = list_checkpoints(out / "checkpoints")
    file = newest / "rank00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    hybrid.train(job(), "single", out, resume="auto")
    said = capsys.readouterr().err
    assert "warning: step-00000004 is skipped: rank00000.safetensors: has " in said
    assert f"goes on from {older}\n" in said


@pytest.mark.parametrize("how", ["step", "run", "checkpoints"])
def test_a_path_of_another_folder(how: str, out: Path, tmp_path: Path) -> None:
    before = records.read(Record, out / "record.json")
    killed(out, after=4)
    kept = contents(out)
    path = {"step": "checkpoints/step-00000002", "run": ".", "checkpoints": "checkpoints"}[how]
    after = hybrid.train(job(), "single", tmp_path / "b", resume=out / path)
    assert steps_of(after) == steps_of(before) and contents(out) == kept
    assert after.resumed_from and after.resumed_from.step == (2 if how == "step" else 4)


def test_steps_that_nobody_has_are_missed_aloud(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Path(shutil.copytree(out / "checkpoints" / "step-00000002", tmp_path / "alone"))
    record = hybrid.train(job(), "single", tmp_path / "b", resume=alone)
    assert [n for n, _ in steps_of(record)] == [2, 3, 4]
    (words,) = [line for line in record.warnings if "not in the record" in line]
    assert words.startswith("2 of the 2 steps before") and words in capsys.readouterr().err


REFUSED = {
    "no folder": ("nowhere", {}, "--resume nowhere: is no folder; valid: auto, a run's folder"),
    "no checkpoint": ("EMPTY", {}, "--resume EMPTY: holds no checkpoint; valid: auto"),
    "another model": (
        "auto",
        {"model__options": {"sizes": [32, 10], "activation": "tanh"}},
        "model.options.sizes = [32, 10]: --resume auto: the checkpoint OUT",
    ),
    "another batch": ("auto", {"train__global_batch": 10}, "train.global_batch = 10: "),
    "another seed": ("OUT", {"train__seed": 1}, "train.seed = 1: --resume OUT: the checkpoint"),
    "momentum": ("auto", {"optimizer__momentum": 0.9}, "optimizer.momentum = 0.9: --resume auto"),
    "fewer steps": ("auto", {"train__steps": 3}, "train.steps = 3: --resume auto: the checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_on_is_refused_before_any_process_starts(
    case: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume, changes, words = REFUSED[case]
    killed(out, after=4)
    (tmp_path / "empty").mkdir()
    places = {"OUT": str(out), "EMPTY": str(tmp_path / "empty")}
    for name, place in places.items():
        resume, words = resume.replace(name, place), words.replace(name, place)
    monkeypatch.setattr("hybrid.training.run.run_ranks", None)
    before = contents(out)
    with pytest.raises(JobError) as refused:
        run_job(job(**changes), "single", out, 1, resume=resume)
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value)
    with pytest.raises(JobError) as refused:
        hybrid.train(job(**changes), "single", out, resume=resume)
    assert str(refused.value).startswith(words) and contents(out) == before


def test_damaged_ones_alone_are_no_beginning(out: Path) -> None:
    killed(out, after=2)
    (out / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    for resume in ("auto", out, out / "checkpoints" / "step-00000002"):
        with pytest.raises(JobError, match=r"manifest\.json: "):
            hybrid.train(job(), "single", out, resume=resume)


def test_what_changes_the_course_is_warned_of(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(out, after=4)
    changes = {"optimizer__lr": 0.05, "train__micro_batches": 3, "log__every": 2}
    hybrid.train(job(train__steps=6, **changes), "single", out, resume="auto")
    warned = [line for line in capsys.readouterr().err.splitlines() if "from step 4 on" in line]
    assert warned == ["hybrid: warning: optimizer.lr = 0.05 from step 4 on; it was 0.1"]


def test_a_new_run_removes_no_checkpoint_of_one_that_did_not_end(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid.train(job(train__steps=3), "single", out)  # the one there has ended well
    assert list_checkpoints(out / "checkpoints")[0].name.endswith("3")
    killed(out, after=2)
    before = contents(out)
    words = "after 2 steps of a run that did not end well (record.json: running)"
    for resume in (None, tmp_path / "other"):
        if resume:
            hybrid.train(job(), "single", resume)
        with pytest.raises(JobError) as refused:
            hybrid.train(job(), "single", out, resume=resume)
        assert words in str(refused.value) and str(refused.value).endswith(
            "valid: --resume auto to go on, or another --out"
        )
        with pytest.raises(JobError):
            run_job(job(), "single", out, 1, resume=resume and str(resume))
        assert contents(out) == before
    (out / "record.json").unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(
        JobError, match=r"was started again; .*record\.json: missing.*--resume auto"
    ):
        hybrid.train(job(), "single", out)
    assert json.loads((out / "job.json").read_text()), "nothing was begun"


def test_a_run_that_went_on_without_saving_has_ended_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    hybrid.train(job(), "single", out)
    last = job(train__steps=job().train.steps + 2)
    unsaved = last.model_copy(update={"checkpoint": Checkpoint()})
    record = hybrid.train(unsaved, "single", out, resume="auto")
    before = (out / "record.json").read_bytes()
    assert hybrid.train(unsaved, "single", out, resume="auto") == record
    assert (out / "record.json").read_bytes() == before
    assert "nothing is left to do" in capsys.readouterr().err
