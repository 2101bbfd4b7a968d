"""A process that leaves with status 0 before the end of its run has failed, and is named."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hybrid import records
from hybrid.job.errors import RunError, RunFailed, Stopped
from hybrid.job.file import to_dict
from hybrid.launch import farewell
from hybrid.launch.endings import explain_exit
from hybrid.launch.stopping import end_now
from hybrid.records import Record
from hybrid.training.leaving import as_failure
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests import early_ends
from tests.conftest import ROOT, hybrid_command, small_job


def job_of(name: str, **options: Any) -> Any:
    limits = {"collective_timeout_s": 20}
    return small_job(model={"name": f"tests.early_ends:{name}", "options": options}, launch=limits)


@pytest.mark.parametrize(
    ("strategy", "way", "where"),
    [
        ("ddp", "quits", "train"),
        ("fsdp", "goes_in_a_thread", "train"),
        ("zero3", "goes", "eval"),
    ],
)
def test_a_rank_that_leaves_early_fails_the_run(
    strategy: str, way: str, where: str, tmp_path: Path
) -> None:
    """The record of the run before is not shown."""
    rank = random.Random(way).randrange(4)
    old = Record(strategy, "ok", reason="of the run before")
    records.write(old, tmp_path / "record.json")
    job = job_of("model", way=way, rank=rank, where=where)
    with pytest.raises(RunFailed) as failed:
        launch(job, strategy, 4, tmp_path, Watcher())
    failure = failed.value.failure
    assert failure.rank == rank and failure.kind == "error"
    if way == "quits":
        line = early_ends._quits.__code__.co_firstlineno + 1
        assert "sys.exit(0) before the end of the run (in step 1), at " in failure.message
        assert f"tests/early_ends.py:{line}" in failure.message
    else:
        assert failure.message.startswith("exited with 0 before the end of its run")
    record = records.read(Record, tmp_path / "record.json")
    assert record.status == "failed" and "of the run before" not in str(record.reason)


def test_a_rank_that_leaves_while_it_loads_data_fails_the_run(tmp_path: Path) -> None:
    job = small_job(data={"name": "tests.early_ends:data", "options": {"rank": 0}})
    with pytest.raises(RunFailed) as failed:
        launch(job, "pipeline", 2, tmp_path, Watcher())
    assert failed.value.failure.rank == 0
    assert "exited with 0 before the end of its run" in failed.value.failure.message


@pytest.mark.parametrize("way", ["quits", "goes"])
def test_a_job_that_ends_its_own_check_is_told_so(way: str, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(to_dict(job_of("everywhere", way=way))))
    done = hybrid_command("check", str(file))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("hybrid: model.name = "), done.stderr
    assert "SystemExit: it ends the program, with status 0, at tests/early_ends.py:" in last
    if way == "quits":
        line = early_ends._quits.__code__.co_firstlineno + 1
        assert last.endswith(f"early_ends.py:{line}"), last


def exits(code: Any) -> SystemExit:
    with pytest.raises(SystemExit) as caught:
        sys.exit(code)
    return caught.value


def test_an_exit_of_the_users_is_an_error_and_a_signals_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for code in (0, None, 3, "words"):
        found = as_failure(exits(code))
        assert isinstance(found, RunError) and f"sys.exit({code!r}) before" in str(found)
        assert explain_exit(exits(code)) == 1
        assert "test_early_ends.py:" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        end_now(15)
    for error in (caught.value, Stopped("stopped by SIGTERM after step 3")):
        assert as_failure(error) is error
    assert explain_exit(caught.value) == 143


HANGING = """
import atexit, sys, threading, time
from hybrid.launch import farewell
farewell.PATIENCE_S = 0.2
atexit.register(time.sleep, 60)
threading.Thread(target=time.sleep, args=(60,)).start()  # no daemon: Python would wait for it
print("last words", end="")
farewell.note_failure()
farewell.leave(7)
"""


def test_a_failed_rank_ends_whatever_hangs() -> None:
    started = time.monotonic()
    words = [sys.executable, "-c", HANGING]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert (done.returncode, done.stdout) == (7, "last words"), done.stderr
    assert time.monotonic() - started < 30


DYING = """
import _thread, threading
from hybrid.launch import farewell
farewell.PATIENCE_S = 0.2
# A thread that is made and ends before it begins, as where its first bytes find no memory.
_thread.start_new_thread = threading._start_new_thread = lambda *_: 0
farewell.note_failure()
farewell.leave(7)
"""


def test_a_failed_rank_ends_whose_threads_end_before_they_begin() -> None:
    done = subprocess.run([sys.executable, "-c", DYING], timeout=50, cwd=ROOT)
    assert done.returncode == 7


def test_groups_of_a_failed_rank_are_left_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Destroying them would wait for a collective that nobody joins."""
    store: Any = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    stay = threading.Event()
    monkeypatch.setattr(farewell, "PATIENCE_S", 0.1)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", stay.wait)
    group, started = dist.group.WORLD, time.monotonic()
    farewell.abandon_groups()
    assert time.monotonic() - started < 5 and group in farewell._kept
    stay.set()
    monkeypatch.undo()
    farewell.abandon_groups()
    assert not dist.is_initialized()
