"""A folder that is full, or that may not be written to, ends a command in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid import records
from hybrid.job.errors import Failure, NoRoom, RunFailed, exit_status, kind_of, needs_room
from hybrid.job.file import to_dict
from hybrid.launch.failures import RankStatus, leave_error
from hybrid.launch.first_cause import first_cause
from hybrid.launch.placement import Placement
from hybrid.records import whole
from hybrid.training import step_log
from hybrid.training.step_log import StepLog
from tests.conftest import hybrid_command, small_job

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Mounts a file system of some bytes, or one that is read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
        if done.returncode:
            pytest.skip("no file system can be mounted here: that needs root and its capabilities")
        return folder

    if os.geteuid():
        pytest.skip("a small file system can be mounted by root alone")
    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def train(out: Path, folder: Path, steps: int) -> Any:
    """`hybrid train` of the small job, in a process."""
    file = folder / "job.json"
    file.write_text(json.dumps(to_dict(small_job(train__steps=steps))))
    words = ["train", str(file), "--strategy", "single", "--nproc", "1", "--out", str(out)]
    return hybrid_command(*words)


@pytest.mark.parametrize(
    ("options", "steps", "words"),
    [
        ("size=16k", 200, "No space left on device"),
        pytest.param("ro", 3, "Read-only file system", marks=pytest.mark.slow),
    ],
)
def test_the_command_says_folder_and_cause_in_one_line(
    options: str, steps: int, words: str, small_disk: Any, tmp_path: Path
) -> None:
    """The log and the file for the error are on the full disk, too."""
    out = small_disk(options) / "run"
    done = train(out, tmp_path, steps)
    said = [x for x in done.stderr.splitlines() if x.startswith("hybrid: ")]
    (line,) = said
    assert re.fullmatch(rf"hybrid: {out}: cannot be written to: {words}( \(\S+\))?", line), line
    assert "Traceback" not in done.stderr and done.returncode == 3


def full(*arguments: Any) -> None:
    raise FULL


def test_a_run_in_this_process_says_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = StepLog.__init__

    def on_a_full_disk(log: Any, *arguments: Any) -> None:
        init(log, *arguments)
        log._file = open("/dev/full", "wb", 0)  # noqa: SIM115 - the log is written to until the end

    monkeypatch.setattr(StepLog, "__init__", on_a_full_disk)
    with pytest.raises(NoRoom, match=f"^{tmp_path}: cannot be written to: No space left on device"):
        hybrid.train(small_job(), "single", tmp_path)
    record = records.read(records.Record, tmp_path / "record.json")
    words = "cannot be written to: No space left on device (steps.jsonl)"
    assert record.reason == f"{tmp_path}: {words}"


@pytest.mark.parametrize("name", ["record.json", "job.json", "steps.jsonl"])
def test_the_file_without_room_is_named_and_the_older_stays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid.train(small_job(train__steps=1), "single", tmp_path)
    before, opened = (tmp_path / name).read_bytes(), whole.no_links

    def no_room_for_it(path: str, flags: int) -> int:
        if name in Path(path).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return opened(path, flags)

    for module in (whole, step_log):
        monkeypatch.setattr(module, "no_links", no_room_for_it)
    with pytest.raises(NoRoom) as failed:
        hybrid.train(small_job(train__steps=2), "single", tmp_path)
    said = f"{tmp_path}: cannot be written to: No space left on device ({name})"
    assert str(failed.value) == said, "not that of a file written later"
    if name != "steps.jsonl":  # which the new run removes
        assert (tmp_path / name).read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_a_comparison_ends_with_the_first_run_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*arguments: Any, **options: Any) -> None:
        raise RunFailed(Failure(0, "out: cannot be written to: full", "", "room"))

    monkeypatch.setattr("hybrid.training.run.run_ranks", no_room)
    with pytest.raises(NoRoom, match=r"^out: cannot be written to: full"):
        hybrid.compare(small_job(), ["ddp"], nproc=2, out=tmp_path)


def test_a_rank_that_cannot_leave_a_file_says_it_where_it_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / ("a long name " * 9) / "logs"
    status = RankStatus(small_job(), Placement(0, 1, 0, "hybrid"), logs)
    words = f"{logs.parent}: cannot be written to: No space left on device"
    monkeypatch.setattr(records, "write", full)
    leave_error(NoRoom(words), status)
    found = first_cause({0: 1}, logs, 0.0)  # and there is no log
    assert found.kind == "room" and found.message == words[-240:]
    assert exit_status(RunFailed(found)) == 3 == exit_status(NoRoom(words))


def means(error: Exception, folder: Path) -> str:
    """What an error of this folder means."""
    try:
        with needs_room(folder):
            raise error
    except Exception as found:
        return kind_of(found)


def named(number: int, file: object = None) -> OSError:
    """The error of the system for a file."""
    return OSError(number, os.strerror(number), file)


def test_which_errors_are_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, elsewhere = tmp_path / "out" / "record.json.part", tmp_path / "else" / "x"
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
        assert means(named(number, str(inside)), tmp_path / "out") == "room"
        assert means(named(number, str(elsewhere)), tmp_path / "out") == "error"
    assert means(named(errno.EROFS, str(tmp_path)), tmp_path / "out" / "x") == "room"
    assert means(named(errno.ENOENT, str(inside)), tmp_path / "out") == "error"
    # Without a name: one that code of the user's raises is of a file of theirs.
    assert means(FULL, tmp_path) == "error"
    monkeypatch.setattr("hybrid.job.errors.users_line", lambda error: "")
    assert means(FULL, tmp_path) == "room"
    assert means(named(errno.EACCES), tmp_path) == "error", "such as of a port"
    rust = RuntimeError("I/O error: No space left on device (os error 28)")
    assert means(rust, tmp_path) == "room"


def test_half_a_file_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        records.write({"a": 1}, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []
