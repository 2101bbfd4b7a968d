"""A rank that raises or dies ends the whole command soon, with that rank's error shown first."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hybrid import records
from hybrid.job.file import to_dict
from tests.conftest import ROOT, small_job

WITHIN_S = 30


def ranks_of(out: Path) -> list[str]:
    """Command lines of processes that still run for a result folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if str(out) in words:
                found.append(" ".join(words))
    return found


def start_train(
    out: Path, strategy: str, steps: int = 6, nproc: int = 2, fault: str = "nothing", **changes: Any
) -> subprocess.Popen[str]:
    """`hybrid train` of the small job, in the background, with a fault of tests/failing.py."""
    out.mkdir()
    records.write(to_dict(small_job(train__steps=steps, **changes)), out / "small.json")
    words = ["train", str(out / "small.json"), "--strategy", strategy, "--nproc", str(nproc)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "failing.py"), fault, *words, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # Containers like to set it, and it would hide that a rank's words stay in a buffer.
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        # A shell has what it starts in the background ignore Ctrl-C, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def ranks_pids(out: Path) -> list[int]:
    """Process ids of a run's ranks (not of its launcher)."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "--parent" in words and str(out) in words:
                pids.append(int(entry.name))
    return sorted(pids)


def wait_for_steps(out: Path, at_least: int) -> None:
    """Until rank 0 has written that many steps."""
    deadline = time.monotonic() + 120
    file = out / "steps.jsonl"
    while not file.exists() or len(file.read_text().splitlines()) < at_least:
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("fault", "strategy", "words"),
    [
        ("raises", "pipeline", "RuntimeError: planted: the sky fell (in step 2)"),
        ("is_killed", "fsdp", "was ended by SIGKILL"),
        ("has_no_memory", "ddp", "out of memory in step 2"),
        (
            "is_stopped",
            "zero2",
            "no sign of life: killed, stopped or cut off (in step 2)",
        ),
        ("sleeps_in_forward", "ddp", "it did not join the others, and is at tests/failing.py:"),
        ("skips_a_collective", "2d", "the ranks call unlike collectives"),
        ("never_starts", "fsdp", "did not "),
        ("goes_elsewhere", "ddp", "no meeting of ranks at MASTER_ADDR:MASTER_PORT = "),
        ("port_is_taken", "local_sgd", "rank 0 cannot listen on port "),
    ],
)
def test_first_cause_is_named(fault: str, strategy: str, words: str, tmp_path: Path) -> None:
    """Of four ranks, the one that is drawn."""
    guilty = 0 if fault == "port_is_taken" else random.Random(fault).randrange(4)
    meets = fault in ("never_starts", "goes_elsewhere", "port_is_taken")
    limits = {"start_timeout_s": 6 if meets else 60, "collective_timeout_s": 6}
    plant = f"{fault}@{guilty}"
    run = start_train(tmp_path / "run", strategy, nproc=4, fault=plant, launch=limits)
    _, stderr = run.communicate(timeout=4 * WITHIN_S)
    assert run.returncode == 1
    came = (tmp_path / "run" / "fault").stat().st_mtime
    assert time.time() - came < WITHIN_S + limits["collective_timeout_s"]
    first = next(line for line in stderr.splitlines() if line.startswith("hybrid: rank "))
    assert words in first, stderr
    assert re.match(rf"hybrid: rank {guilty} on \S+: ", first) and ranks_of(tmp_path / "run") == []
    if fault == "is_killed":
        assert "planted: last words\n" in (tmp_path / f"run/logs/rank{guilty}.log").read_text()


def test_a_killed_rank_ends_the_command(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start_train(out, "ddp", steps=100_000)
    wait_for_steps(out, 3)
    pids = ranks_pids(out)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = run.communicate(timeout=WITHIN_S)
    assert time.monotonic() - killed < WITHIN_S
    assert run.returncode == 1
    first = next(line for line in stderr.splitlines() if line.startswith("hybrid: "))
    assert "rank 1" in first and "SIGKILL" in first, stderr
    assert ranks_pids(out) == []


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_ending_the_command_ends_its_ranks(number: int, status: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start_train(out, "zero1", steps=100_000)
    wait_for_steps(out, 2)
    run.send_signal(number)
    _, stderr = run.communicate(timeout=WITHIN_S)
    assert run.returncode == status
    assert ("hybrid: interrupted" in stderr.splitlines()) == (number == signal.SIGINT)
    deadline = time.monotonic() + 10
    while ranks_pids(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_pids(out) == []
