"""Commands in odd surroundings: streams, names of files, signals, what is printed of any text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid.job.errors import JobError
from hybrid.job.imports import find_function
from hybrid.job.shown import LONGEST_LINE, cut_lines, on_one_line, without_controls
from hybrid.launch.endings import say
from tests.conftest import SMALL

HYBRID = f"{sys.executable} -m hybrid"
# Python's modules, and torch, which a folder has files of the same names of.
HIDDEN = ("typing", "random", "json", "torch", "io", "enum", "signal", "contextlib", "dataclasses")


def shell(command: str, folder: Path, **more: str) -> subprocess.CompletedProcess[bytes]:
    """What a command in bash ends with, typed in `folder`."""
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=os.environ | more, capture_output=True, timeout=120
    )


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">/dev/full", "<&- >&- 2>&-", "2>/dev/full"])
def test_streams_that_take_nothing_change_no_exit_status(streams: str, tmp_path: Path) -> None:
    both = f"{HYBRID} strategies {streams}; echo $? > good; {HYBRID} train none.toml"
    shell(f"{both} --strategy ddp {streams}; echo $? > bad", tmp_path)
    assert [(tmp_path / name).read_text() for name in ("good", "bad")] == ["0\n", "2\n"]


def test_what_a_full_output_lacks_is_said_and_a_reader_that_left_is_not(tmp_path: Path) -> None:
    full = shell(f"{HYBRID} strategies --json >/dev/full", tmp_path)
    assert full.stderr.decode().count("\n") == 1 and b"No space left" in full.stderr
    left = shell(f"{HYBRID} strategies | head -1; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (left.returncode, left.stderr) == (0, b"")


def test_too_few_open_files_are_refused_before_any_process_starts(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(SMALL))
    done = shell(f"ulimit -n 30; {HYBRID} train job.json --strategy ddp --nproc 4", tmp_path)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr.decode()
    assert b"--nproc: a process of 4 has 33 files open or more, and here" in done.stderr


def test_a_run_in_a_strange_folder_with_its_output_closed_and_few_open_files(
    tmp_path: Path,
) -> None:
    folder = tmp_path / os.fsdecode(b"n\xff\x1b[31m")
    folder.mkdir()
    for name in HIDDEN:
        (folder / f"{name}.py").write_text("x = 1")
    (folder / "job.json").write_text(json.dumps(SMALL))
    words = "compare job.json --strategies single,ddp --nproc 2 --set train.steps=2 --out"
    out = folder / "out"
    done = shell(f'ulimit -n 64; {HYBRID} {words} "$PWD/out" >&-', folder)
    assert done.returncode == 0, done.stderr.decode()
    assert b"warm process has ended" not in done.stderr
    assert json.loads((out / "compare.json").read_text())["ok"]
    for name in ("compare.md", "report.html"):
        assert "\x1b" not in (out / name).read_text(encoding="utf-8")


def test_a_signal_before_the_command_has_begun_is_answered(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import time; open('here', 'w').close(); time.sleep(60)")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    command = [sys.executable, "-m", "hybrid", "strategies"]
    for number, code, words in (
        (signal.SIGTERM, 143, "hybrid: stopped by SIGTERM before it began\n"),
        (signal.SIGINT, 130, "hybrid: interrupted\n"),
    ):
        (tmp_path / "here").unlink(missing_ok=True)
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
            # A shell has commands in the background ignore Ctrl-C, and so the tests there.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while not (tmp_path / "here").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == words
        assert process.returncode == code


def test_a_users_file_that_a_library_hides_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "random.py").write_text("def make(): pass")
    (tmp_path / "my_own_data_of_this_test.py").write_text("def make(): return 5")
    with pytest.raises(JobError, match=r"hides random\.py here; valid: random\.py renamed, or"):
        find_function("data.name = 'random:make'", "random:make")
    assert find_function("data.name", "my_own_data_of_this_test:make")() == 5
    assert sys.path[0] != str(tmp_path) and sys.path[-1] == str(tmp_path)


def test_whatever_is_in_a_message_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    wild = "a\x1b[31mb\r\nc\x07\u202e\udcff" + "x" * 10**6 + " valid: this"
    assert say(wild, 2) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line[:-1].isprintable() and line.endswith(" valid: this\n")
    assert len(line) < 2 * LONGEST_LINE and r"a\x1b[31mb c\x07" in line
    assert on_one_line("a  b\n c") == "a b c"
    assert without_controls("a\x1b\n\tb\x9b\ud800") == "a\\x1b\n\tb\\x9b\\ud800"
    assert [len(x) < 2 * LONGEST_LINE for x in cut_lines(f"a\n{wild}\nb").split("\n")] == [True] * 4
