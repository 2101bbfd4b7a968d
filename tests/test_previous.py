"""A comparison says which it is; the one before it is kept whole and apart until it has ended."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hybrid import records
from hybrid.comparison import previous
from hybrid.comparison.previous import RESULTS, SESSION
from hybrid.job.errors import Failure, JobError, RunFailed
from hybrid.records import Comparison
from hybrid.training import leftovers
from tests.conftest import small_job
from tests.launches import Launches, compare, launches

__all__ = ["launches"]  # a fixture
FAILED = RunFailed(Failure(2, "planted", ""))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what is in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_file_says_which_comparison_it_is_of(launches: Launches) -> None:
    first = compare(launches, ["ddp", "pipeline"], small_job(proxy={"train.steps": 2}))
    found = json.loads((launches.out / "compare.json").read_text())
    assert found["id"] == first.id and first.id
    marks = {path: json.loads(path.read_text()) for path in launches.out.rglob("record.json")}
    assert {one["comparison"] for one in marks.values()} == {first.id} and len(marks) > 4
    assert json.loads((launches.out / SESSION).read_text())["id"] == first.id
    assert json.loads((launches.out / "proxy" / "compare.json").read_text())["id"] == first.id
    for name in ("compare.md", "report.html"):
        assert first.id in (launches.out / name).read_text()
    assert compare(launches, ["ddp"], resume=False).id != first.id
    assert not (launches.out / "proxy").exists() and not (launches.out / "pipeline").exists()


def test_the_one_before_is_kept_until_another_has_ended_well(
    launches: Launches,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, kept = launches.out, launches.out / "previous"
    (out / "mine").mkdir()
    for name in ("mine/record.json", "notes.txt"):
        (out / name).write_text("{}")
    first = compare(launches, ["ddp", "fsdp"])
    (out / "ddp" / "notes.txt").write_text("mine")
    before = {name: text for name, text in files_of(out).items() if "notes" not in name}
    launches.ends["fsdp"] = FAILED
    second = compare(launches, ["fsdp"])
    now = files_of(kept)
    moved = json.loads(now.pop("moved.json"))
    del before["mine/record.json"]
    assert now == before and (moved["comparison"], moved["replaced_by"]) == (first.id, second.id)
    assert f"{kept} keeps the comparison {first.id} until" in capsys.readouterr().err
    assert files_of(out / "ddp") == {"notes.txt": b"mine"} and (out / "mine/record.json").exists()
    compare(launches, ["fsdp"])  # a failed one takes the place of no better one
    assert json.loads((kept / "moved.json").read_text())["comparison"] == first.id
    (kept / "ddp" / "more.txt").write_text("mine")
    launches.ends.clear()
    compare(launches, ["fsdp"])
    assert files_of(kept) == {"ddp/more.txt": b"mine"}
    compare(launches, ["zero1"])
    assert files_of(kept) == {"ddp/more.txt": b"mine"}
    assert (out / "notes.txt").exists() and not (out / "fsdp").exists()


class Killed(BaseException):
    """Nothing handles it, and the process changes nothing more."""


def killed_after(changes: int, patch: pytest.MonkeyPatch, out: Path) -> bool:
    """Make way in `out`, and end after so many changes there; tell whether it came to its end."""
    made = list[str]()

    def counted(name: str, change: Any) -> Any:
        def call(*arguments: Any, **how: Any) -> Any:
            if len(made) >= changes:
                raise Killed
            made.append(name)
            return change(*arguments, **how)

        return call

    with patch.context() as patched:
        for name in ("rename", "replace", "unlink", "rmdir"):
            patched.setattr(os, name, counted(name, getattr(os, name)))
        try:
            previous.make_way(out, "new")
        except Killed:
            return False
    return True


def test_a_kill_at_any_moment_keeps_the_old_results(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out, saved = launches.out, tmp_path_factory.mktemp("saved") / "out"
    first = compare(launches, ["ddp"], small_job(proxy={"train.steps": 2}))
    assert first.id
    old, ended, moment = files_of(out), False, 0
    shutil.copytree(out, saved)
    while not ended:
        ended = killed_after(moment, monkeypatch, out)
        found: dict[str, bytes] = {}
        for where in (out, out / "previous.part", out / "previous"):
            found |= {name: text for name, text in files_of(where).items() if name in old}
        assert found == old, moment
        assert first.id in previous.make_way(out, "newer")  # the next comparison begins
        kept = files_of(out / "previous")
        assert b"new" in kept.pop("moved.json") and kept == old, moment
        previous.remove_previous(out)  # and has ended well
        assert not files_of(out), moment
        shutil.rmtree(out)
        shutil.copytree(saved, out)
        moment += 1
    assert moment > 10


def test_a_killed_comparison_leaves_what_was_kept(launches: Launches) -> None:
    out = launches.out
    compare(launches, ["ddp", "fsdp"])
    old = {name: text for name, text in files_of(out).items()}
    for _ in range(2):
        launches.ends["fsdp"] = KeyError("killed")  # type: ignore[assignment]
        with pytest.raises(KeyError):
            compare(launches, ["ddp", "fsdp"])
        kept = files_of(out / "previous")
        kept.pop("moved.json")
        assert kept == old and not any((out / name).exists() for name in RESULTS)
    launches.ends.clear()
    launches.made.clear()
    assert compare(launches, ["ddp", "fsdp"], resume=True).ok
    assert launches.made == ["fsdp"] and not (out / "previous").exists()


def test_a_record_of_another_comparison_is_not_kept(
    launches: Launches,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = compare(launches, ["ddp", "fsdp"])
    file = launches.out / "ddp" / "record.json"
    record = json.loads(file.read_text())
    for mark, said in (("2026-01-01T00:00:00Z-00", "the comparison 2026"), (None, "no comparison")):
        records.write(record | {"comparison": mark}, file)
        launches.made.clear()
        assert compare(launches, ["ddp", "fsdp"], resume=True).id == first.id
        assert launches.made == ["ddp"]
        assert f"ddp: begins anew: its record is of {said}" in capsys.readouterr().err
    assert json.loads(file.read_text())["comparison"] == first.id


def test_what_an_earlier_release_left(launches: Launches) -> None:
    """It gave no `id`: its results and runs are known by their names alone."""
    compare(launches, ["ddp", "fsdp"])
    for path in [*launches.out.rglob("record.json"), launches.out / SESSION]:
        found = json.loads(path.read_text())
        path.write_text(json.dumps({k: found[k] for k in found if k not in ("comparison", "id")}))
    launches.made.clear()
    result = compare(launches, ["ddp", "fsdp"], resume=True)
    assert result.ok and result.id is None and launches.made == []
    launches.ends["zero1"] = FAILED
    compare(launches, ["zero1"])
    assert (launches.out / "previous" / "fsdp" / "record.json").exists()
    assert not (launches.out / "fsdp").exists()
    assert records.read(Comparison, launches.out / "previous" / "compare.json").ok


@pytest.mark.parametrize(
    ("name", "text"),
    [("report.html", "mine"), ("compare.json", "{}"), ("ddp/record.json", "[]"), ("ddp", "")],
)
def test_files_of_others_are_not_taken_for_results(
    name: str,
    text: str,
    launches: Launches,
) -> None:
    file = launches.out / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    with pytest.raises(JobError, match=f"{name}|ddp") as refused:
        compare(launches, ["ddp"])
    assert file.read_text() == text and "\n" not in str(refused.value)
    assert launches.made == [] and os.listdir(launches.out) == [name.partition("/")[0]]


def test_names_in_a_file_lead_nowhere(launches: Launches) -> None:
    """Whatever names of runs `compare.json` has, nothing outside the folder is moved."""
    out, beside = launches.out / "out", launches.out / "beside"
    begun = beside / "record.json"
    begun.parent.mkdir()
    begun.write_text('{"strategy": "ddp", "status": "ok"}')
    out.mkdir()
    for name in RESULTS:
        (out / name).write_text('{"strategies": {"../beside": {}, "..": {}}, "parity": {}}')
    (out / SESSION).write_text('{"job": {}, "nproc": 1, "id": [1]}')
    previous.make_way(out, "new")
    assert begun.exists() and leftovers.is_ours(begun)
    assert sorted(files_of(out / "previous")) == sorted([*RESULTS, SESSION, "moved.json"])
