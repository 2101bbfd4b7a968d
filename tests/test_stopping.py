"""A signal has a run save and leave, all ranks after the same step, whoever got it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid
from hybrid import records
from hybrid.checkpoint.folders import list_checkpoints
from hybrid.engines.step_queue import LocalRow, StartedStep, StepQueue, StepRow
from hybrid.engines.step_results import step_result
from hybrid.engines.tally import Tally
from hybrid.job.errors import Stopped
from hybrid.job.file import to_dict
from hybrid.launch import stopping
from hybrid.launch.stopping import PassedOn, StopSignals, requeue, told
from hybrid.records import Record
from tests.conftest import small_job
from tests.test_failures import ranks_pids, start_train, wait_for_steps
from tests.test_one_door import torchrun

WITHIN_S = 10
LONG: dict[str, Any] = {"checkpoint": {"every": 10**6}, "steps": 10**6}


def stopped(out: Path, run: subprocess.Popen[str], name: str, status: int) -> Record:
    """The record of a run that has saved and left within the time, as its last line says."""
    sent = time.monotonic()
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == status and time.monotonic() - sent < WITHIN_S, stderr
    record = records.read(Record, out / "record.json")
    (folder,) = list_checkpoints(out / "checkpoints")
    step = int(folder.name.removeprefix("step-"))
    said = f"stopped by {name} after step {step}, which is saved; --resume auto goes on"
    assert (record.status, record.reason) == ("failed", said)
    assert [line for line in stderr.splitlines() if "stopped" in line] == [f"hybrid: {said}"]
    assert len((out / "steps.jsonl").read_text().splitlines()) == step and not ranks_pids(out)
    return record


@pytest.mark.parametrize(
    ("strategy", "name", "status", "who", "changes"),
    [
        ("ddp", "SIGTERM", 143, "one rank", {"log": {"every": 5000}, "data__workers": 1}),
        ("fsdp", "SIGUSR1", 143, "all ranks", {}),
        ("local_sgd", "SIGINT", 130, "the launcher", {"strategy__local_sgd": {"sync_every": 7}}),
    ],
)
def test_all_ranks_save_after_the_same_step(
    strategy: str, name: str, status: int, who: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    out, number = tmp_path / "run", signal.Signals[name]
    run = start_train(out, strategy, nproc=4, **LONG, **changes)
    try:
        wait_for_steps(out, 1)
        ranks = ranks_pids(out)
        pids = {"one rank": ranks[2:3], "all ranks": ranks, "the launcher": [run.pid]}[who]
        for pid in pids:
            os.kill(pid, number)
        stopped(out, run, name, status)
    finally:
        run.kill()


@pytest.fixture(autouse=True)
def _python_s_own_handlers() -> Iterator[None]:
    """The handlers that Python starts with: other tests run the command line in this process."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    job, out = small_job(checkpoint__every=50, train__steps=9), tmp_path / "run"
    whole = hybrid.train(job, "single", tmp_path / "whole")

    def stop(step: Any, total: int) -> None:
        if step.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="after step 5, which is saved") as left:
        hybrid.train(job, "single", out, stop)
    assert left.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    after = hybrid.train(job, "single", out, resume="auto")
    assert after.steps == whole.steps and after.checkpoint == whole.checkpoint


@pytest.mark.parametrize("where", ["evaluate", "save"])
def test_a_signal_in_an_evaluation_or_a_save_is_acted_on_after_it(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid.training import in_progress
    from hybrid.training.checkpointing import Checkpoints

    place, name = (in_progress, "evaluate") if where == "evaluate" else (Checkpoints, "save")
    original, calls = getattr(place, name), list[int]()

    def signalled(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 - (where == "save"):
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*given, **more)

    monkeypatch.setattr(place, name, signalled)
    job = small_job(checkpoint__every=3, train__eval_every=2)
    with pytest.raises(Stopped, match=f"SIGUSR1 after step {2 if where == 'evaluate' else 3}, "):
        hybrid.train(job, "single", tmp_path)


def test_the_last_evaluation_and_the_first_step_wait_for_nothing(tmp_path: Path) -> None:
    def stop(step: Any, total: int) -> None:
        if step.step == total - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    job = small_job(checkpoint__every=4)
    with pytest.raises(Stopped, match="after step 6, which is saved"):
        hybrid.train(job, "single", tmp_path / "end", stop)
    record = hybrid.train(job, "single", tmp_path / "end", resume="auto")
    assert record.status == "ok" and record.eval and len(record.steps) == 6


def test_without_checkpoints_a_signal_is_not_handled(tmp_path: Path) -> None:
    seen = list[Any]()
    job = small_job(train__steps=2)
    hybrid.train(job, "single", tmp_path, lambda *_: seen.append(signal.getsignal(signal.SIGTERM)))
    assert seen == [signal.SIG_DFL] * 2


def test_a_handler_notes_the_first_signal_and_ends_at_the_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with StopSignals() as stops:
        stops.waits, stops.saved = True, 40
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told() == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)  # by the launcher: the same one
        with pytest.raises(Stopped, match="stopped by SIGUSR1 after step 40"):
            stops.act_at_once()
        monkeypatch.setattr(stopping, "SAME_S", 0.0)
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
    with StopSignals() as stops, pytest.raises(Stopped, match="before the first step was saved"):
        os.kill(os.getpid(), signal.SIGTERM)
    with StopSignals() as stops:
        stops.waits = True
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            stopping.give_up()  # another rank failed meanwhile
    with PassedOn():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert told() == 0


def test_a_handler_of_the_caller_s_own_stays() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert told() == 0 and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_slurm_is_told_to_run_the_job_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert requeue(Stopped("", signal.SIGUSR1)) == "", "it is no job of SLURM's"
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert requeue(Stopped("", signal.SIGTERM)) == ""
    assert requeue(Stopped("", signal.SIGUSR1)) == "; SLURM requeues job 17"
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    program.write_text("#!/bin/sh\necho not allowed >&2\nexit 1\n")
    assert requeue(Stopped("", signal.SIGUSR1)) == "; SLURM does not requeue job 17: not allowed"


def test_rows_are_sent_at_least_once_a_second_by_rank_0_s_clock() -> None:
    step = StartedStep(0, [], norm_is_whole=True, has_norm=True, loss_scale=None)
    queue = StepQueue(torch.device("cpu"), every=100, hurried=True)
    sent = 0
    for _ in range(12):
        if queue.is_due():
            sent += bool(queue.waiting)
            queue.send()
            list(queue.take())
        queue._noted -= 0.3  # as if the step had taken that long
        row = LocalRow(Tally(torch.device("cpu")), 0, 2.0, 0.1)
        queue.add(StartedStep(**vars(step) | {"rows": [row]}))
    assert sent == 4, "the first, and then every third"
    calm = StepQueue(torch.device("cpu"), every=3)
    calm.waiting = [step] * 2
    assert not calm.is_due()
    calm.waiting = [step] * 3
    assert calm.is_due()


def test_one_rank_s_word_reaches_all() -> None:
    step = StartedStep(0, [], norm_is_whole=True, has_norm=True, loss_scale=None)
    rows = [StepRow(1.0, 1, 2.0, 1, 1, 0, 0, 0, 0, 0.1, stop) for stop in (0.0, 10.0, 0.0)]
    assert step_result(step, rows, [2.0] * 3).stop == 10
    assert step_result(step, rows[:1], [2.0]).stop == 0


def test_torchrun_starts_it_again_and_it_goes_on(tmp_path: Path) -> None:
    """A rank kills itself once; then the run goes on, and once more on another number of ranks.

    Without a prefix of its own the second attempt would meet the first one's keys in torchrun's
    store."""
    job, out = small_job(checkpoint__every=2, train__steps=5), tmp_path / "again" / "run"
    whole = hybrid.train(job, "single", tmp_path / "whole")
    attempts = ("--max-restarts", "1", "--nproc-per-node", "4")
    done = torchrun(job, out, *attempts, fault="dies_once", more=("--resume", "auto"))
    assert done.returncode == 0, done.stderr[-3000:]
    record = records.read(Record, out / "record.json")
    assert (record.status, record.world_size) == ("ok", 4)
    assert record.resumed_from and record.resumed_from.step == 2
    losses = [step.loss for step in record.steps]
    assert losses == pytest.approx([step.loss for step in whole.steps], rel=1e-6)
    longer = small_job(checkpoint__every=2, train__steps=6)
    done = torchrun(longer, out, "--nproc-per-node", "3", more=("--resume", "auto"))
    record = records.read(Record, out / "record.json")
    assert (record.status, record.world_size, len(record.steps)) == ("ok", 3, 6), done.stderr
    assert record.resumed_from and record.resumed_from.step == 5


def test_torchrun_passes_a_signal_on(tmp_path: Path) -> None:
    job = small_job(train__steps=10**6, checkpoint__every=10**6)
    records.write(to_dict(job), tmp_path / "job.json")
    out = tmp_path / "run"
    words = ["train", str(tmp_path / "job.json"), "--strategy", "ddp", "--out", str(out)]
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    run = subprocess.Popen(
        [*program, "--standalone", "-m", "hybrid", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for_steps(out, 1)
        run.terminate()
        stopped(out, run, "SIGTERM", 1)
    finally:
        run.kill()
