"""A results folder is one command's alone while that runs, and no longer."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid.job.errors import JobError
from hybrid.launch import folder_lock
from hybrid.launch.folder_lock import LOCK, hold, hold_log, refuse_held
from hybrid.launch.placement import Placement
from hybrid.training.claiming import claim_for_run
from tests.conftest import ROOT

HOLDS = """
import sys
from pathlib import Path
from hybrid.launch.folder_lock import hold, hold_log
with hold(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""
TRIES = """
import sys
from pathlib import Path
from hybrid.launch.folder_lock import hold
for folder in sys.argv[1:]:
    try:
        with hold(Path(folder)):
            print("held")
    except ValueError as error:
        print(error)
assert "torch" not in sys.modules
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python of its own, whose input stays open."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another command has `tmp_path/out`, as a rank of the launch "here:1"."""
    command = start(HOLDS, tmp_path / "out", "here:1")
    assert command.stdout is not None and command.stdout.readline() == "held\n"
    yield command
    command.kill()
    command.communicate()


def test_the_second_command_is_told_who_has_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with hold(out):
        told = json.loads((out / LOCK).read_text())
        assert told["pid"] == os.getpid() and told["since"].endswith(" UTC")
        (tmp_path / "link").symlink_to(out)
        folders = [out, tmp_path / "link", out / "ddp", out / "a" / "b", out.parent, tmp_path / "x"]
        said, _ = start(TRIES, *folders).communicate()
        *refused, last = said.splitlines()
        who = f"in use by process {told['pid']} on {told['host']} since {told['since']} ("
        assert len(refused) == 5 and all(who in line for line in refused) and last == "held"
        assert refused[0].startswith(f"--out {out}: is {who}")
        assert refused[2].startswith(f"--out {out / 'ddp'}: {out} is {who}")
        assert os.listdir(out) == [LOCK]
        with hold(out / "ddp"):  # a run of the comparison that has the folder
            assert not (out / "ddp").exists()
    assert not out.parent.exists(), "nothing was written there"


def test_another_thread_is_another_command(tmp_path: Path) -> None:
    said = list[str]()

    def try_it() -> None:
        with pytest.raises(JobError) as refused, hold(tmp_path):
            pass
        said.append(str(refused.value))

    with hold(tmp_path):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert f"in use by process {os.getpid()} " in said[0]


def test_no_child_keeps_the_lock(tmp_path: Path) -> None:
    """A process that was forked or started by a command that is killed lives on."""
    code = "import os, subprocess, time\n" + HOLDS.replace(
        '    print("held", flush=True)',
        '    child = subprocess.Popen(["sleep", "60"], close_fds=False)\n'
        "    if (forked := os.fork()) == 0:\n"
        "        time.sleep(60)\n"
        "    print(child.pid, forked, flush=True)",
    )
    command = start(code, tmp_path, "")
    assert command.stdout is not None
    children = [int(word) for word in command.stdout.readline().split()]
    try:
        command.kill()
        command.wait()
        with hold(tmp_path):
            pass
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
    assert len(children) == 2


def test_a_killed_command_leaves_no_lock(tmp_path: Path, held: subprocess.Popen[str]) -> None:
    held.kill()
    held.wait()
    assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == held.pid
    with hold(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / LOCK).read_text())["pid"] == os.getpid()


def test_a_lock_on_a_removed_file_is_none(tmp_path: Path, monkeypatch: Any) -> None:
    """The command before removes its file after this one has opened it."""
    flock, looks = fcntl.flock, list[int]()

    def late(descriptor: int, kind: int) -> None:
        looks.append(descriptor)
        if len(looks) == 1:
            (tmp_path / LOCK).unlink()
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with hold(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert len(looks) == 2


def test_ranks_of_one_launch_share_it(tmp_path: Path, held: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(folder_lock, "TOLD_S", 0.2)
    refuse_held(tmp_path / "out", "here:1")
    refuse_held(tmp_path / "other", "here:2")
    for out, launch in (("out", "here:2"), ("out", None), ("out/ddp", "here:2")):
        with pytest.raises(JobError, match=f"in use by process {held.pid} "):
            refuse_held(tmp_path / out, launch)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    rank = Placement(3, 4, 3, "torchrun")
    with pytest.raises(JobError, match="in use"), claim_for_run(tmp_path / "out", rank, False):
        pass
    with claim_for_run(tmp_path / "mine", Placement(0, 4, 0, "torchrun"), False):
        assert json.loads((tmp_path / "mine" / LOCK).read_text())["launch"] == "node7:29500"
        assert "in use by process" in start(TRIES, tmp_path / "mine" / "x").communicate()[0]


def test_a_rank_that_still_runs_is_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    log = tmp_path / "ddp" / "logs" / "rank2.log"
    log.parent.mkdir(parents=True)
    log.touch()
    code = "import sys; from pathlib import Path; from hybrid.launch.folder_lock import hold_log\n"
    code += "hold_log(Path(sys.argv[1])); print('holds', flush=True); sys.stdin.read()"
    rank = start(code, log)
    assert rank.stdout is not None and rank.stdin is not None
    assert rank.stdout.readline() == "holds\n"
    monkeypatch.setattr(folder_lock, "ENDING_S", 0.2)
    words = "rank2 of a command that has ended still runs"
    with pytest.raises(JobError, match=words), hold(tmp_path):
        pass
    monkeypatch.setattr(folder_lock, "ENDING_S", 30.0)
    threading.Timer(0.3, rank.kill).start()
    with hold(tmp_path):
        assert rank.wait(5) == -signal.SIGKILL
    rank.communicate()
    hold_log(tmp_path / "not there.log")


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: Any) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    said = list[str]()
    monkeypatch.setattr("builtins.print", lambda line, **_: said.append(line))
    with hold(tmp_path):
        pass
    assert len(said) == 1 and "no lock is possible here (No locks available)" in said[0]
