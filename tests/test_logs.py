"""Under launchers that keep no logs each rank's is on disk, and the terminal shows what it did."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybrid import records
from hybrid.job.file import to_dict
from tests.conftest import ROOT, small_job
from tests.ports import free_port
from tests.test_failures import ranks_of

KEEP = """
import os, signal, subprocess, sys, warnings
from pathlib import Path
from hybrid.launch.logs import redirect_output
from hybrid.launch.placement import Placement
print("before")
redirect_output(Path(sys.argv[1]), Placement(1, 2, 1))
"""


def as_rank_1(code: str, logs: Path) -> tuple[str, str, str, int]:
    """Runs code after `redirect_output`: standard output and error, the log, the exit status."""
    done = subprocess.run(
        [sys.executable, "-c", KEEP + code, str(logs)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    return done.stdout, done.stderr, (logs / "rank1.log").read_text(), done.returncode


def test_the_log_has_all_and_the_terminal_what_python_says(tmp_path: Path) -> None:
    code = "print('ünï'); os.write(1, b'C\\n'); os.system('echo child >&2'); warnings.warn('care')"
    stdout, stderr, log, _ = as_rank_1(code, tmp_path / "logs")
    assert stdout == "before\nünï\n"
    assert "care" in stderr and "child" not in stderr
    assert log.startswith("ünï\nC\nchild\n") and "care" in log and "before" not in log


def test_a_traceback_is_in_both(tmp_path: Path) -> None:
    _, stderr, log, status = as_rank_1("raise ValueError('of the model')", tmp_path)
    assert (stderr, status) == (log, 1)
    assert log.startswith("Traceback") and log.endswith("ValueError: of the model\n")


def test_a_killed_rank_s_last_words_are_in_its_log(tmp_path: Path) -> None:
    code = "print('last words'); os.kill(os.getpid(), signal.SIGKILL)"
    stdout, _, log, status = as_rank_1(code, tmp_path)
    assert (log, stdout, status) == ("last words\n", "before\nlast words\n", -signal.SIGKILL)


def test_a_crash_of_c_is_told_in_the_log(tmp_path: Path) -> None:
    code = "import faulthandler; faulthandler.enable(); os.abort()"
    _, stderr, log, status = as_rank_1(code, tmp_path)
    assert "Fatal Python error: Aborted" in log and (stderr, status) == ("", -signal.SIGABRT)


def test_what_an_earlier_run_left_goes(tmp_path: Path) -> None:
    for name in ("rank1.log", "rank1.error.json", "rank3.error.json", "rank2.log", "rank.txt"):
        (tmp_path / name).write_text("old")
    as_rank_1("", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"rank1.log", "rank2.log", "rank.txt"}
    assert (tmp_path / "rank1.log").read_text() == ""


def test_a_process_that_outlives_its_rank_holds_nothing_up(tmp_path: Path) -> None:
    late = "sleep 5; echo late"
    began = time.monotonic()
    as_rank_1(f"subprocess.Popen(['sh', '-c', '{late}'])", tmp_path)
    assert time.monotonic() - began < 5, "the launcher waited for the end of the stream"
    first = (tmp_path / "rank1.log").open()
    as_rank_1("print('next run')", tmp_path)
    deadline = time.monotonic() + 10
    while not (words := first.read()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (words, (tmp_path / "rank1.log").read_text()) == ("late\n", "next run\n")


def job_of(out: Path, steps: int = 4, every: int | None = None) -> list[str]:
    """A command on the small job."""
    job = small_job(train__steps=steps, checkpoint__every=every)
    records.write(to_dict(job), out / "small.json")
    return ["train", str(out / "small.json"), "--strategy", "ddp", "--out", str(out)]


def under_torchrun(nproc: int, fault: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command whose ranks meet this fault of tests/failing.py."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node", str(nproc), "tests/failing.py", fault, *command],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_under_torchrun_a_rank_that_raises(tmp_path: Path) -> None:
    done = under_torchrun(2, "raises", job_of(tmp_path))
    where, cause = [x for x in done.stderr.splitlines() if x.startswith("hybrid: ")][:2]
    assert where == f"hybrid: what each rank N prints is in {tmp_path}/logs/rankN.log"
    assert cause.startswith("hybrid: rank 1 on ") and "planted: the sky fell" in cause
    assert "RuntimeError: planted: the sky fell\n" in done.stderr.partition("Traceback")[2]
    assert "planted: Python's words" in done.stdout and "C's words" not in done.stdout
    log = (tmp_path / "logs" / "rank1.log").read_text()
    assert "planted: Python's words\nplanted: C's words\n" in log
    assert log.index(cause) < log.index("Traceback")
    assert "because of rank 1" in (tmp_path / "logs" / "rank0.log").read_text()
    assert done.returncode == 1 and ranks_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "every"),
    [
        ("raises_while_others_sleep", None),
        ("raises_and_others_are_ended", None),
        ("raises_and_others_are_ended", 1000),  # a job whose ranks save where a signal stops them
    ],
)
def test_ranks_that_the_launcher_ends_say_for_whom(
    tmp_path: Path, fault: str, every: int | None
) -> None:
    guilty, host = random.Random(fault).randrange(4), socket.gethostname()
    done = under_torchrun(4, f"{fault}@{guilty}", job_of(tmp_path, every=every))
    for rank in {*range(4)} - {guilty}:
        log = (tmp_path / "logs" / f"rank{rank}.log").read_text()
        cause = f"ends, because of rank {guilty} on {host}: RuntimeError: planted: the sky fell"
        assert f"hybrid: rank {rank} on {host} {cause}" in log
    record = json.loads((tmp_path / "record.json").read_text())
    assert f"rank {guilty} on {host}: RuntimeError: planted: the sky fell" in record["reason"]
    assert done.returncode == 1 and ranks_of(tmp_path) == []


@pytest.mark.slow
def test_as_the_deepspeed_launcher_starts_them(tmp_path: Path) -> None:
    """It names the ranks of a host in a word of its own, and sets no threads."""
    words, logs = job_of(tmp_path), tmp_path / "logs"
    logs.mkdir()
    (logs / "rank1.error.json").write_text("of an earlier run")
    shared = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CROSS_RANK": "0", "MASTER_ADDR": "localhost"}
    shared |= {"MASTER_PORT": str(free_port())}
    environ = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | shared
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "hybrid", *words, "--json"],
            env=environ | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in "01"
    ]
    (result, said), (nothing, _) = (rank.communicate(timeout=120) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said
    record = json.loads(result)
    threads = record["environment"]["threads_per_rank"]
    assert threads == max(1, record["environment"]["cores"] // 2) and nothing == ""
    assert "hybrid: OMP_NUM_THREADS is not set: " in said and "ddp: starting, 4 steps\n" in said
    assert {path.name for path in logs.iterdir()} == {
        f"rank{rank}.{kind}" for rank in "01" for kind in ("log", "where")
    }
