"""Workers load the batches of coming steps: the same ones, named errors, none is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils._pytree import tree_leaves

import hybrid
from hybrid.data.batches import BatchPlan
from hybrid.data.samples import job_sets
from hybrid.data.steps import StepLoader
from hybrid.data.workers import WorkerLoader, end_workers
from hybrid.job.errors import JobError, RunError
from hybrid.measure.clock import Instruments
from tests import own_data
from tests.conftest import ROOT, small_job
from tests.own_data import Own

NAME = "data.name = 'a user's'"


def own_job(data: str, steps: int = 6, **changes: Any) -> Any:
    """A job of two workers and batches of 8."""
    given: dict[str, Any] = {
        "model": {"name": "tests.own_data:class_model", "options": {}},
        "data": {"name": f"tests.own_data:{data}", "workers": 2},
        "train__steps": steps,
        "train__global_batch": 8,
    }
    return small_job(**(given | changes))


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "fork_server" not in " ".join(p.cmdline())]


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    before = set(children())
    yield
    end_workers()
    deadline = time.monotonic() + 10
    while left := set(children()) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def open_loader(sets: Any, workers: int, shares: int = 2) -> tuple[StepLoader, WorkerLoader]:
    samples = job_sets(NAME, 5, *sets)[0]
    alone = StepLoader(BatchPlan(len(samples), 9, shares, 2, 3), samples, [shares - 1])
    return alone, WorkerLoader(alone, range(2, 14), workers, pin=False)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_load_what_the_process_itself_would(workers: int) -> None:
    """Through two epochs, with the numbers that samples draw, and with padding to each longest."""
    for sets in ((*own_data.augmented_sets(), None), own_data.sentences()):
        state = torch.get_rng_state()
        alone, loader = open_loader(sets, workers)
        assert torch.equal(torch.get_rng_state(), state), "the process's own numbers stay"
        for step in range(2, 14):
            expected, found = alone.step(step), loader.step(step)
            assert [b.ids.tolist() for b in found] == [b.ids.tolist() for b in expected]
            for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
                assert all(
                    torch.equal(x, y)
                    for x, y in ((a.input, b.input), (a.target, b.target), (a.ids, b.ids))
                )
        loader.close()


def test_steps_come_in_order_alone() -> None:
    _, loader = open_loader((*own_data.augmented_sets(), None), 1)
    with pytest.raises(ValueError, match="step 3 is not the next one"):
        loader.step(3)


def test_an_error_in_a_worker_names_the_sample_and_has_its_traceback() -> None:
    samples = job_sets(NAME, 5, *own_data.failing(17), None)[0]
    alone = StepLoader(BatchPlan(50, 9, 1, 1, None), samples, [0])
    loader = WorkerLoader(alone, range(6), 2, pin=False)
    loader.step(0)
    with pytest.raises(RunError) as raised:
        loader.step(1)
    line = f"{NAME}: train sample 17: KeyError: 'no such picture', at tests/own_data.py:"
    assert str(raised.value).startswith(line)
    assert "in make\n    raise KeyError" in "".join(raised.value.__notes__)


class Graph:
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle a Graph")


def test_what_cannot_reach_the_rank_is_an_error_and_not_a_wait() -> None:
    own = {"a": torch.ones(2, requires_grad=True) * 2}
    fine = Own(20, lambda i: (own, 1))
    _, loader = open_loader((fine, fine, None), 1, 1)
    assert not loader.step(2)[0].input["a"].requires_grad
    key = Graph()
    odd = Own(20, lambda i: ({key: torch.ones(2)}, 1))
    _, loader = open_loader((odd, odd, None), 1, 1)
    with pytest.raises(RunError, match="cannot pickle a Graph"):
        loader.step(2)


def test_a_worker_that_is_killed_is_named() -> None:
    def make(i: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    killed = Own(20, make)
    _, loader = open_loader((killed, killed, None), 2, 1)
    with pytest.raises(RunError, match=r"data.workers = 2: a worker ended while it loaded data"):
        loader.step(2)


def test_a_worker_that_is_killed_leaves_no_socket_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # A name that multiprocessing has made before stays this process's own.
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    _, loader = open_loader((*own_data.augmented_sets(), None), 1)
    loader.step(2)
    for worker in children():
        worker.kill()
    assert list(tmp_path.iterdir()) == []


def test_workers_of_a_failed_run_are_ended() -> None:
    before = set(children())
    with pytest.raises(RunError, match="train sample 17: KeyError") as raised:
        hybrid.train(own_job("failing"), "single")
    assert set(children()) == before, "also while the error, and what it holds, is there"
    assert raised.traceback


def test_the_time_of_loading_is_in_the_speed_and_workers_hide_it() -> None:
    """8 samples of 20 ms a step; a step of two micro-batches computes for 120 ms."""
    records = {
        workers: hybrid.train(
            own_job("slow", 9, data__workers=workers, model__options={"sleepy": True}), "single"
        )
        for workers in (0, 2)
    }
    paces = {workers: record.throughput for workers, record in records.items()}
    assert paces[0] and paces[2]
    assert paces[0].loading_s_mean > 0.16 and paces[0].samples_per_s < 8 / (0.16 + 0.12)
    assert paces[2].loading_s_mean < paces[0].loading_s_mean / 3
    assert paces[2].samples_per_s > paces[0].samples_per_s
    losses = [[step.loss for step in record.steps] for record in records.values()]
    assert losses[0] == losses[1] and records[0].eval == records[2].eval


def test_the_speed_counts_loading_that_comes_in_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 timed steps of 1 s every second waits 3 s: 2.5 s a step, of which 1.5 s are loading."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for ahead, timed in ((0, 6), (2, 4)):
        clock = Instruments(9, 1, torch.device("cpu"), ahead=ahead)
        lines = []
        for step in range(9):
            now[0] += 50.0  # an evaluation between steps
            clock.interrupt()
            clock.begin_loading()
            now[0] += 3.0 * (step % 2)
            clock.end_loading()
            clock.step(step, lambda: now.append(now.pop() + 1.0))
            lines.append(clock.read(clock.last_step))
        clock.close()
        pace = clock.throughput(10, 100)
        assert pace is not None and pace.timed_steps == timed
        assert pace.step_s_median == pace.step_s_mean == 2.5 and pace.loading_s_mean == 1.5
        assert pace.samples_per_s == 4 and pace.tokens_per_s == 40
        assert [line["seconds"] for line in lines[:2]] == [1.0, 4.0]
        assert [line["loading_s"] for line in lines[:2]] == [0.0, 3.0]
    assert list(Instruments(6, 1, torch.device("cpu"), ahead=8).timed) == [3, 4, 5]


def test_workers_are_a_number() -> None:
    for value in (-1, 1.5, "2"):
        with pytest.raises(JobError, match=r"data.workers"):
            small_job(data__workers=value)


DIES = """
import os, signal, sys, psutil
import hybrid
from hybrid.data.batches import BatchPlan
from hybrid.data.steps import StepLoader
from hybrid.data.workers import WorkerLoader
from tests.own_data import slow
alone = StepLoader(BatchPlan(48, 8, 1, 1, 0), slow(60.0)[0], [0])
loader = WorkerLoader(alone, range(4), 2, False)
print(*[p.pid for p in psutil.Process().children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_rank_that_is_killed() -> None:
    """They end at once, though they are in the middle of a sample that takes a minute."""
    command = [sys.executable, "-c", DIES]  # its pipes are open while a worker lives
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2, done.stderr
    deadline = time.monotonic() + 3
    while any(map(psutil.pid_exists, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_strategies_with_workers_compute_the_same(tmp_path: Path) -> None:
    """Sentences that a collate function pads to each micro-batch's longest, or the job's."""
    model = {"name": "tests.own_data:word_model", "options": {}}
    job = own_job("sentences", 4, train__global_batch=10, model=model)
    result = hybrid.compare(job, strategies=["ddp", "pipeline"], nproc=2, out=tmp_path)
    assert result.ok, result.parity
