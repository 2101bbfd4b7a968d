"""Ranks forked from one warm process are what ranks started afresh are, and nothing stays."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

import hybrid
from hybrid import records
from hybrid.job.errors import RunFailed
from hybrid.launch import local
from hybrid.launch.local import run_ranks
from hybrid.launch.warm import warm_process, warm_ranks
from hybrid.strategies import registry
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests.conftest import ROOT, small_job

TELL = """
import os, sys, threading
print("arguments", sys.argv[1:], os.getcwd())
print("variables", os.environ["RANK"], os.environ["MARK"], sys.path[0])
sys.stderr.write("no line feed")
if sys.argv[1] == "exit": sys.exit(int(sys.argv[2]))
if sys.argv[1] == "raise": raise ValueError("planted")
if sys.argv[1] == "kill": os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.fixture
def tell(tmp_path: Path) -> list[str]:
    """A program that says what it sees, and ends as it is told."""
    (tmp_path / "tell.py").write_text(TELL)
    return [sys.executable, str(tmp_path / "tell.py")]


def ends(tell: list[str], out: Path, *arguments: str) -> tuple[str, str]:
    """What a rank of the program leaves: its first cause, and its log."""
    cause = "none"
    try:
        run_ranks(1, arguments, out, program=tell)
    except RunFailed as error:
        cause = error.failure.message
    return cause, (out / "logs" / "rank0.log").read_text()


def said(text: str, folder: Path, modules: Sequence[str], ranks: int = 1) -> list[str]:
    """What each rank of a program with this text says, after the modules have been imported."""
    (folder / "program.py").write_text(text)
    program = [sys.executable, str(folder / "program.py")]
    run_ranks(ranks, [], folder, program=program, modules=modules)
    return [(folder / "logs" / f"rank{rank}.log").read_text() for rank in range(ranks)]


@pytest.mark.parametrize(
    "arguments",
    [("exit", "0"), ("exit", "3"), ("raise",), ("kill", "9"), ("kill", "15"), ("a b", "é\n")],
)
def test_a_fork_is_what_a_fresh_process_is(
    tell: list[str], tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARK", "set before")
    with warm_ranks():
        assert warm_process() is not None
        forked = ends(tell, tmp_path / "forked", *arguments)
    with warm_ranks(fresh=True):
        assert warm_process() is None
        fresh = ends(tell, tmp_path / "fresh", *arguments)
    # A fork's traceback goes through the module that runs programs.
    trim = [text[: text.find("Traceback")] if "raise" in arguments else text for text in fresh]
    assert [text[: len(t)] for text, t in zip(forked, trim, strict=True)] == trim
    assert "set before" in forked[1] and forked[1].count("planted") == fresh[1].count("planted")


def test_all_ranks_come_from_one_process_which_ends(tmp_path: Path) -> None:
    importlib.import_module("torch")  # else the job is checked in a fork too
    with warm_ranks(fresh=True), warm_ranks():  # a process of this test's own
        result = hybrid.compare(small_job(), ["ddp", "pipeline"], nproc=2, out=tmp_path)
        holder = warm_process()
        assert holder is not None and len(holder.codes) == 5, "single, two ranks of each"
        assert set(holder.codes.values()) == {0}
    assert result.ok
    assert holder.process.poll() is not None


def test_ranks_are_shown_by_their_own_command_and_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(records.dumps(hybrid.job.file.to_dict(small_job())))
    words = ["train", str(tmp_path / "job.json"), "--strategy", "ddp", "--nproc", "2"]
    words += ["--set", "train.steps=100000", "--out", str(tmp_path / "run")]
    run = subprocess.Popen([sys.executable, "-m", "hybrid", *words], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "steps.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (server,) = psutil.Process(run.pid).children()
    ranks = server.children()
    assert len(ranks) == 2
    for rank in ranks:
        assert rank.cmdline()[:4] == [sys.executable, "-m", "hybrid", "train"]
        assert os.getpgid(rank.pid) == rank.pid, "a group of its own"
    server.send_signal(signal.SIGKILL)  # such as by a host without memory
    assert run.wait(30) == 1
    psutil.wait_procs(ranks, timeout=10)
    assert not any(rank.is_running() for rank in ranks)


def test_another_environment_has_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with warm_ranks():
        first = warm_process()
        assert warm_process() is first
        monkeypatch.setenv("MARK", "new")
        assert warm_process() is not first


def test_the_next_rank_starts_afresh_where_the_process_has_ended(
    tell: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MARK", "")
    with warm_ranks():
        warm = warm_process()
        assert warm is not None
        monkeypatch.setattr(local, "warm_process", lambda: warm)
        warm.process.kill()
        warm.process.wait()
        assert ends(tell, tmp_path, "exit", "0")[0] == "none"
    assert "hybrid: the warm process has ended: ranks start afresh" in capsys.readouterr().err


def test_a_fork_that_may_not_use_the_gpu_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a module that used it while it was imported: a stand-in says so here."""
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "bad.py").write_text(
        "import sys, types\n"
        "sys.modules['torch.cuda'] = types.SimpleNamespace(_is_in_bad_fork=lambda: True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with warm_ranks():
        text = "import sys; print('fresh', 'torch.cuda' not in sys.modules)"
        (log,) = said(text, tmp_path, ["bad"])
    assert "hybrid: this rank starts afresh: an imported module has used the GPU" in log
    assert "fresh True" in log


def test_forks_draw_other_numbers(tmp_path: Path) -> None:
    """As processes do that are started afresh, where nobody has seeded numpy or Python."""
    text = "import random, numpy; print(random.random(), numpy.random.rand())"
    with warm_ranks():
        logs = said(text, tmp_path, ["numpy.random", "random"], ranks=3)
    drawn = [log.split() for log in logs]
    assert len({numbers[0] for numbers in drawn}) == len({numbers[1] for numbers in drawn}) == 3


def test_an_optimizer_imports_nothing_after_the_fork(tmp_path: Path) -> None:
    """Since torch imports its compiler for one, which takes each rank a second."""
    text = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])\n"
        "print('new:', *set(sys.modules) - before)\n"
    )
    with warm_ranks():
        (log,) = said(text, tmp_path, registry.modules("ddp"))
    assert log.splitlines()[-1] == "new:"


def telling(folder: str) -> Any:
    """A model whose rank writes, when it evaluates, what has been imported since it was made."""
    import torch
    from torch import nn

    before = set(sys.modules)

    class Telling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training and (rank := os.environ.get("RANK")):
                Path(folder, f"rank{rank}").write_text(" ".join(set(sys.modules) - before))
            return super().forward(x)

    torch.manual_seed(0)
    return [Telling(32, 11), nn.Linear(11, 10)], nn.CrossEntropyLoss()


@pytest.mark.parametrize("strategy", registry.NAMES)
def test_a_rank_imports_next_to_nothing_after_the_fork(strategy: str, tmp_path: Path) -> None:
    model = {"name": "tests.test_warm:telling", "options": {"folder": str(tmp_path)}}
    nproc = {"single": 1, "pipeline": 2}.get(strategy, 4)
    with warm_ranks():
        launch(small_job(model=model), strategy, nproc, tmp_path / "out", Watcher())
    told = [path.read_text().split() for path in tmp_path.glob("rank*")]
    assert told
    for names in told:
        own = [name for name in names if name.startswith("hybrid.")]
        assert len(names) <= 8 and not own, names


def test_the_end_of_a_rank_finalizes_nothing_of_the_warm_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "holder.py").write_text("import tempfile; kept = tempfile.TemporaryDirectory()\n")
    text = (
        "import holder, tempfile\n"
        "own = tempfile.TemporaryDirectory()\n"
        "print(holder.kept.name)\n"
        "print(own.name)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with warm_ranks():
        (log,) = said(text, tmp_path, ["holder"])
        kept, own = log.splitlines()[-2:]
        assert Path(kept).is_dir() and not Path(own).exists()
    shutil.rmtree(kept, ignore_errors=True)  # of a process that has been killed


def test_many_runs_leave_nothing(tell: list[str], tmp_path: Path) -> None:
    os.environ["MARK"] = ""
    try:
        with warm_ranks():
            ends(tell, tmp_path, "exit", "0")
            warm = warm_process()
            assert warm is not None
            here, there = psutil.Process(), psutil.Process(warm.process.pid)
            before = [here.num_fds(), there.num_fds(), len(here.children())]
            for _ in range(50):
                ends(tell, tmp_path, "exit", "0")
            assert [here.num_fds(), there.num_fds(), len(here.children())] == before
            assert there.children() == []
    finally:
        del os.environ["MARK"]
