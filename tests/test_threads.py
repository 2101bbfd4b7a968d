"""Ranks that share a host share its cores, whoever started them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hybrid.launch import local, threads
from hybrid.launch.placement import find_placement
from hybrid.launch.threads import VARIABLE, set_num_threads
from hybrid.training.check import check_job
from hybrid.training.progress import Progress
from hybrid.training.run import launch

from .conftest import small_job

RANKS = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
STEP = {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}
OMPI = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}


def share(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], own: int = 16, launcher: int = 16
) -> str | None:
    """OMP_NUM_THREADS after `share`, in a rank that may use `own` cores of its launcher's."""
    for key in (VARIABLE, "SLURM_STEP_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(threads, "num_cores", lambda process=0: launcher if process else own)
    set_num_threads(find_placement())
    return os.environ.get(VARIABLE)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the command line, which shares before it imports torch."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    ("variables", "own", "launcher", "expected"),
    [
        (RANKS, 16, 16, "4"),
        (RANKS, 2, 2, "1"),
        (RANKS, 8, 32, "8"),  # bound to cores of its own
        (RANKS, 1, 16, "1"),
        (RANKS, 16, 32, "8"),  # bound to a socket, with another rank
        (RANKS | {"OMP_NUM_THREADS": "3"}, 16, 16, "3"),
        (RANKS | {"LOCAL_WORLD_SIZE": "1"}, 16, 16, None),
        (RANKS | STEP, 16, 64, "4"),  # a step that has a part of its node
        (RANKS | STEP | OMPI, 8, 64, "8"),  # of mpirun's in a SLURM job
        (RANKS | STEP | {"SLURM_CPUS_PER_TASK": "6"}, 6, 64, "6"),
        (RANKS | STEP | {"SLURM_CPUS_PER_TASK": "6"}, 64, 64, "6"),
    ],
)
def test_a_rank_takes_its_share(
    variables: dict[str, str],
    own: int,
    launcher: int,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert share(monkeypatch, variables, own, launcher) == expected


@pytest.mark.usefixtures("without_torch")
def test_rank_0_says_so_and_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    share(monkeypatch, RANKS, 4, 4)
    said = "hybrid: OMP_NUM_THREADS is not set: 1 thread for each of the 4 ranks of this host\n"
    assert capsys.readouterr().err == said
    share(monkeypatch, RANKS | {"RANK": "1"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("found", "told", "set_to"), [(16, [4], "4"), (4, [], "4"), (1, [], "1")])
def test_a_torch_that_is_imported_is_told(
    found: int, told: list[int], set_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = types.ModuleType("torch")
    heard: list[int] = []
    torch.get_num_threads = lambda: found  # type: ignore[attr-defined]
    torch.set_num_threads = heard.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert share(monkeypatch, RANKS) == set_to
    assert heard == told, "what computes with no more threads has been told by its user"


def test_an_emulation_has_the_threads_of_a_rank_that_it_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More threads sum up in another order, so that the two would round differently."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(local, "num_cores", lambda: 4)
    for replicas in (None, 2):
        job = small_job(train__steps=1, strategy__local_sgd={"emulate_replicas": replicas})
        checked = check_job(job).job
        record = launch(checked, "local_sgd", 1, tmp_path / str(replicas), Progress(shared=True))
        assert record.environment["threads_per_rank"] == (2 if replicas else 4)


SLICES = """
import ctypes, os, platform, struct, threading
from hybrid.launch.threads import short_time_slices
def read():
    found = ctypes.create_string_buffer(48)
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, found, 48, 0) == 0
    _, policy, _, nice, _, runtime, _, _ = struct.unpack("=IIQiIQQQ", found)
    print(policy, nice, runtime)
os.nice(3)
read()
with short_time_slices():
    read()
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
read()
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
read()
with short_time_slices():
    read()
"""


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (6, 12),
    reason="Linux takes a length of time slices from 6.12 on",
)
def test_a_rank_s_threads_run_for_a_short_time_while_others_wait() -> None:
    done = subprocess.run([sys.executable, "-c", SLICES], capture_output=True, text=True)
    before, inside, in_thread, after, batch, in_batch = done.stdout.splitlines()
    assert inside == in_thread == "0 3 100000", done.stdout + done.stderr
    assert before == after and before.startswith("0 3 ") and before != inside
    assert batch == in_batch and batch.startswith("3 3 ")
