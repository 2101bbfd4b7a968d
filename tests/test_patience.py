"""How long ranks wait for one another: long while they set up and save, short in steps."""

from __future__ import annotations

import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybrid.job.errors import RunFailed
from hybrid.launch import blocking_calls
from hybrid.training.check import check_job
from hybrid.training.progress import Watcher
from hybrid.training.run import launch

from .conftest import small_job
from .test_lost_peers import groups, said

SLOW_S = 7.0  # that the drawn rank is late by
STEP_S = 3  # launch.collective_timeout_s


def late_data(late: int) -> tuple[Any, Any]:
    """Random data, for which one rank takes longer than a step may wait."""
    if dist.is_initialized() and dist.get_rank() == late:
        time.sleep(SLOW_S)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(37, 5, generator=generator), torch.randint(3, (37,), generator=generator)
    every = torch.utils.data.TensorDataset(x, y)
    return every, torch.utils.data.TensorDataset(x[:11], y[:11])


class _LateLayer(torch.nn.Linear):
    """Sleeps once in training, in the second step, on the rank that is drawn."""

    late, calls = -1, 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and dist.is_initialized() and torch.is_grad_enabled():
            self.calls += 1
            if dist.get_rank() == self.late and self.calls == 5:
                time.sleep(100)
        return super().forward(input)


def late_model(late: int) -> tuple[Any, Any]:
    """A small classifier, in which a rank sleeps."""
    layer = _LateLayer(5, 3)
    layer.late = late
    return torch.nn.Sequential(torch.nn.Linear(5, 5), layer), torch.nn.CrossEntropyLoss()


def job_of(**changes: Any) -> Any:
    """The small job under a short patience for steps."""
    data = {"name": "tests.test_patience:late_data", "options": {"late": changes.pop("late", -1)}}
    model = {"name": "mlp", "options": {"sizes": [5, 4, 3]}}
    limits = {"collective_timeout_s": STEP_S, "setup_timeout_s": 60}
    rest = {"data": data, "model": model, "train__global_batch": 13, "launch": limits}
    return small_job(**rest | changes)


def test_a_rank_may_set_up_for_longer_than_a_step_may_wait(tmp_path: Path) -> None:
    """One of four takes 7 s for its data, where a step would wait for 3 s."""
    job = check_job(job_of(late=random.Random(15).randrange(4))).job
    record = launch(job, "ddp", 4, tmp_path, Watcher())
    assert record.status == "ok" and len(record.steps) == 6


def test_a_step_has_the_patience_of_steps(tmp_path: Path) -> None:
    """One of four sleeps in a step: the run ends long before the patience of setting up does."""
    late = random.Random(16).randrange(4)
    model = {"name": "tests.test_patience:late_model", "options": {"late": late}}
    job, begun = check_job(job_of(model=model)).job, time.monotonic()
    with pytest.raises(RunFailed, match=rf"rank {late} on ") as raised:
        launch(job, "ddp", 4, tmp_path, Watcher())
    assert time.monotonic() - begun < 40 and "time.sleep" not in str(raised.value)


def test_a_message_waits_as_long_as_was_set_last() -> None:
    """gloo gives a message the patience that its group was made with; a collective needs none."""
    first, second = groups(2, 30)
    blocking_calls.mark()
    try:
        blocking_calls.set_message_timeout(timedelta(seconds=0.3))
        begun, work = time.monotonic(), first.recv([torch.ones(3)], 1, 0)
        assert "Timed out waiting 300ms for recv" in said(work.wait)
        assert 0.2 < time.monotonic() - begun < 5
        both = [group.allreduce([torch.ones(3)]) for group in groups(2, 30)]
        assert [work.wait() for work in both] == [True, True]
    finally:
        blocking_calls.set_message_timeout(None)
        blocking_calls.unmark()
    del second
