"""What a rank waits, counts and keeps outside the steps of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hybrid
from hybrid.job.variants import resolve
from hybrid.launch import process_group
from hybrid.launch.failures import RankStatus
from hybrid.launch.placement import Placement
from hybrid.measure.clock import Instruments
from hybrid.records import steps
from hybrid.training import evaluating_ranks, guard, in_progress, loop
from hybrid.training.branches import _anywhere
from hybrid.training.in_progress import RunInProgress
from hybrid.training.progress import Watcher
from hybrid.training.resume import compare_jobs
from hybrid.training.run import launch
from tests.conftest import small_job

LIMITS = {"setup_timeout_s": 97, "collective_timeout_s": 31}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the groups of this process were told to wait."""
    seconds: list[float] = []
    plain = process_group.set_timeouts
    monkeypatch.setattr(process_group, "set_timeouts", lambda s: (seconds.append(s), plain(s)))
    return seconds


@pytest.mark.parametrize("compiles", [False, True])
def test_an_engine_in_a_users_own_loop_waits_as_in_steps(told: list[float], compiles: bool) -> None:
    job = small_job(launch=LIMITS, train__compile=compiles)
    torch.manual_seed(0)
    model = hybrid.build_model(job)
    try:
        hybrid.open_engine(job, "ddp", *model).close()
        assert told == ([] if compiles else [31])
        hybrid.open_engine(job, "ddp", *model).close()  # in the group of its caller
        assert len(told) == (not compiles)
        patience = 97 if compiles else 31
        group = dist.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout.seconds == patience  # type: ignore[attr-defined]
    finally:
        hybrid.cleanup()


def test_an_evaluation_of_a_checkpoint_waits_as_in_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, seen = small_job(launch=LIMITS), list[Any]()
    status = RankStatus(job, Placement())
    engine = SimpleNamespace(layout=job, close=lambda: None)

    def stop(*_: Any) -> None:
        seen.append(status._seconds)
        raise KeyboardInterrupt

    def opened(*_: Any) -> SimpleNamespace:
        seen.append(status._seconds)
        return engine

    monkeypatch.setattr(evaluating_ranks, "_open", opened)
    monkeypatch.setattr(evaluating_ranks, "evaluate", stop)
    saved: Any = SimpleNamespace(job=job, describe=dict)
    with pytest.raises(KeyboardInterrupt):
        evaluating_ranks._evaluate(saved, "single", tmp_path, Placement(), status)
    assert seen == [97, 31]


def test_the_projection_is_no_traffic_of_the_strategy(tmp_path: Path) -> None:
    """Of local SGD on four ranks, which meet each third step."""
    job = small_job(strategy__local_sgd={"sync_every": 3}, train__steps=9)
    record = launch(job, "local_sgd", 4, tmp_path, Watcher())
    assert record.comm and record.comm.by_op["all_gather"]["calls"] == [1.0] * 4


def test_a_run_without_a_folder_keeps_all_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MOST", 4)
    for until in (None, 7):
        record = hybrid.train(small_job(train__steps=9), "single", until=until)
        assert [one.step for one in record.steps] == [*range(until or 9)] and not record.left_out


def test_the_steps_in_which_torch_compiles_wait_longer() -> None:
    """It compiles once more when the counter is removed, after the third step here."""
    for compiles in (False, True):
        job, counted = small_job(train__compile=compiles), range(2, 3)
        run: Any = SimpleNamespace(job=job, instruments=SimpleNamespace(counted=counted))
        found = [loop._Run._compiles_in(run, step) for step in range(6)]
        assert found == [compiles] * 4 + [False] * 2


def test_going_back_is_no_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    instruments = Instruments(9, 1, torch.device("cpu"))
    job = small_job()
    status = RankStatus(job, Placement())
    engine = SimpleNamespace(
        guard=SimpleNamespace(set_state=lambda *_, **__: None), skip_to=lambda _: None
    )
    steps = SimpleNamespace(changed=True)
    run: Any = SimpleNamespace(engine=engine, instruments=instruments, status=status, steps=steps)
    run.back, run.checkpoints = {7: 2}, None
    slow = 0.2

    def load(_: Any) -> dict[str, Any]:
        time.sleep(slow)
        return {"record": {}}

    monkeypatch.setattr(guard, "_load_newest", load)
    seconds = []
    for step in (7, 8):
        instruments.begin_loading()
        instruments.end_loading()
        instruments.step(step, lambda: None)
        seconds.append(instruments.read(instruments.last_step)["seconds"] or 0.0)
        if step == 7:
            guard.go_back(run, step)
    instruments.close()
    assert max(seconds) < slow


@pytest.mark.parametrize("ends", ["_save", "end_early"])
def test_the_end_of_a_run_waits_longer_than_a_step(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first thing that others wait for: rank 0 may be writing still."""
    status, seen = RankStatus(small_job(launch=LIMITS), Placement()), list[float]()
    status.hurry(in_step=True)

    def look(*_: Any) -> Sequence[bool]:
        seen.append(status._seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(in_progress, "gather_objects", look)
    run: Any = SimpleNamespace(status=status, out=None, checkpoints=SimpleNamespace(wait=look))
    with pytest.raises(KeyboardInterrupt):
        getattr(RunInProgress, ends)(run)
    assert seen == [97]


def test_another_part_of_the_test_set_is_told_where_its_score_chooses() -> None:
    before = {**hybrid.job.file.to_dict(small_job(train__eval_batches=1))}
    for best in (None, "loss"):
        kept = {"every": 2, "best": best} if best else None
        job = small_job(train__eval_batches=2, **({"checkpoint": kept} if kept else {}))
        changed = compare_jobs("here", resolve(job, "single"), before, "single")
        assert changed == ([("train.eval_batches", 2, 1)] if best else [])


def test_weights_of_a_gpu_run_are_looked_at_on_any_host() -> None:
    asked = {device: _anywhere(small_job(launch__device=device)).launch.device
             for device in ("cpu", "auto", "cuda")}  # fmt: skip
    assert asked == {"cpu": "cpu", "auto": "auto", "cuda": "auto"}
