"""Files that readers open are whole or not there, under names that nobody can foresee."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid import records, report
from hybrid.job.variants import resolve
from hybrid.launch.failures import RankStatus
from hybrid.launch.placement import Placement
from hybrid.records import Record, whole
from hybrid.records.whole import new_file, part_of, whole_file, working_folder, write_whole
from hybrid.training.exporting import _at_once
from hybrid.training.folder import begin_run
from hybrid.training.step_log import StepLog
from tests.conftest import ROOT, small_job
from tests.test_report import make_comparison

OLD = "what was there before\n"


def names(folder: Path) -> set[str]:
    """What lies in a folder."""
    return {path.name for path in folder.iterdir()}


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Sets what the modes of new files lack."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    begin_run(tmp_path, small_job(), resolve(small_job(), "single"))
    report.write(make_comparison(), tmp_path)
    RankStatus(small_job(), Placement(), tmp_path / "logs").close()
    log = StepLog(True, tmp_path)
    with new_file(tmp_path / "rank0.log"), _at_once(tmp_path / "weights") as part:
        part.mkdir()
        (part / "model.safetensors").touch(0o600)  # as the library of safetensors does
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    files = {name for name in found if "." in name}
    assert log and len(files) == 9, files
    assert {found[name] for name in files} == {0o666 & ~umask}
    assert found["weights"] == 0o777 & ~umask


@pytest.mark.parametrize("how", ["error", "signal"])
def test_what_was_there_stays_until_the_new_one_is_whole(how: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(OLD)
    with pytest.raises((OSError, SystemExit)), whole_file(path) as file:
        file.write(b"half of")
        file.flush()
        assert path.read_text() == OLD
        raise OSError(28, "No space left on device") if how == "error" else SystemExit(143)
    assert path.read_text() == OLD and names(tmp_path) == {"record.json"}
    write_whole(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == {"record.json"}


def test_a_kill_leaves_the_old_file_and_a_part_that_the_next_start_removes(tmp_path: Path) -> None:
    """At every write, before the new file has its name."""
    code = "import os; from hybrid import records; from pathlib import Path\n"
    code += "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
    code += "[records.write({'a': 1}, Path(n)) for n in os.sys.argv[1:]]"
    job = small_job()
    kept = [tmp_path / name for name in ("record.json", "job.json", "steps.jsonl", "mine.json")]
    for path in kept:
        path.write_text(OLD)
        killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT)
        assert killed.returncode == -signal.SIGKILL and path.read_text() == OLD
    assert len(names(tmp_path)) == 8
    records.write(Record("single", "ok"), tmp_path / "record.json")  # else it is of no run
    (tmp_path / "steps.jsonl").write_text("")
    begin_run(tmp_path, job, resolve(job, "single"))
    left = {name for name in names(tmp_path) if name.endswith(".part")}
    assert len(left) == 1 and left.pop().startswith(".mine.json."), "a file of another is removed"


def test_a_name_that_was_guessed_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert part_of(tmp_path / "x") != part_of(tmp_path / "x")
    monkeypatch.setattr(whole.secrets, "token_hex", lambda n: "0" * 2 * n)
    victim = tmp_path / "victim"
    victim.write_text(OLD)
    for path in (tmp_path / "steps.jsonl", tmp_path / "logs" / "rank0.where", tmp_path / "a.json"):
        path.parent.mkdir(exist_ok=True)
        for link in (path, part_of(path)):
            link.symlink_to(victim)
    with pytest.raises(FileExistsError, match=r"a\.json'$"):
        records.write({}, tmp_path / "a.json")
    part_of(tmp_path / "a.json").unlink(missing_ok=True)
    records.write({}, tmp_path / "a.json")
    RankStatus(small_job(), Placement(), tmp_path / "logs").close()
    with pytest.raises(OSError, match=r"steps\.jsonl"):
        StepLog(True, tmp_path)
    assert victim.read_text() == OLD
    assert not (tmp_path / "a.json").is_symlink()


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_page_that_cannot_be_made_leaves_the_results_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("compare.json", "compare.md", "report.html"):
        (tmp_path / name).write_text(OLD)
    monkeypatch.setattr("hybrid.report.files.html", full)
    with pytest.raises(OSError, match="No space"):
        report.write(make_comparison(), tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {OLD}
    monkeypatch.undo()
    for name in ("compare.md", "session.json"):
        part_of(tmp_path / name).touch()  # of a killed comparison
    paths = report.write(make_comparison(), tmp_path)
    assert [path.name for path in paths] == ["compare.json", "compare.md", "report.html"]
    assert all(path.read_text() != OLD for path in paths) and len(names(tmp_path)) == 3


def test_an_odd_character_is_written_as_an_escape(tmp_path: Path) -> None:
    write_whole(tmp_path / "x.md", "of \udcff")
    assert (tmp_path / "x.md").read_text() == "of \\udcff"


def test_no_half_line_of_a_step_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = StepLog(True, tmp_path)
    log._lines = ['{"step": 0, "loss": 1.0}\n']
    log.write()
    whole_text, write = (tmp_path / "steps.jsonl").read_bytes(), log._file.write

    class Full:
        """Takes some bytes, and then no more."""

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, text: bytes) -> int:
            log._file.write = full
            return int(write(text[:9]))

    file = log._file
    log._file, log._lines = Full(), ['{"step": 1, "loss": 0.5}\n']
    with pytest.raises(OSError, match=r"steps\.jsonl"):
        log.write()
    assert (tmp_path / "steps.jsonl").read_bytes() == whole_text


def test_the_folder_of_a_killed_export_goes_and_that_of_another_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    with working_folder(path) as mine:
        (mine / "half").touch()
        left = part_of(path)
        left.mkdir()
        monkeypatch.setattr(whole, "YOUNG_S", -1.0)
        with working_folder(path):
            assert mine.exists() and not left.exists()
    assert names(tmp_path) == set()
