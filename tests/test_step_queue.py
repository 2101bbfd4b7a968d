"""The numbers of a step reach every rank while the next one runs, none is lost, none waits."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import hybrid
from hybrid.engines.step_queue import (
    HALF,
    LocalRow,
    StartedStep,
    StepQueue,
    StepRow,
)
from hybrid.engines.step_results import norms_of, step_result
from hybrid.engines.tally import Tally
from hybrid.job.errors import RunError, RunFailed
from hybrid.models.losses import cross_entropy
from hybrid.records import Record
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests.conftest import small_job

STEP = StartedStep(3, [], norm_is_whole=True, has_norm=True, loss_scale=None)


def row(loss: float, targets: int, samples: int, digest: int, **other: float) -> StepRow:
    """One rank's numbers of a step."""
    halves = (float(digest // HALF), float(digest % HALF), 0.0, 0.0)
    norm, expected = other.get("norm", 2.0), other.get("expected", targets)
    return StepRow(loss, targets, norm, expected, samples, *halves, other.get("lr", 0.1))


def ranks(**second: float) -> list[StepRow]:
    """Two ranks' rows of a step, with changes to the second."""
    return [row(3.0, 2, 2, 2**64 - 1), row(5.0, 6, 3, 2, **second)]


def local_row(loss: float, norm: Any, digest: int = 0) -> LocalRow:
    """A row of one sample."""
    tally = Tally(torch.device("cpu"))
    tally.parts, tally.samples, tally.seen._digest = [(torch.tensor(loss), 1)], 1, digest
    return LocalRow(tally, 1, norm, 0.1)


def result(rows: list[StepRow], step: StartedStep = STEP) -> Any:
    return step_result(step, rows, norms_of(step, rows, [[0, 1]]))


def test_a_step_is_put_together_from_its_ranks() -> None:
    step = result(ranks(norm=2.0 + 1e-7))
    assert (step.loss, step.grad_norm, step.lr, step.samples) == (1.0, 2.0, 0.1, 5)
    assert step.sample_digest == f"{1:016x}"
    assert step.digest_by_rank == (f"{2**64 - 1:016x}", f"{2:016x}")


def test_parts_of_a_norm_add_up() -> None:
    parts = dataclasses.replace(STEP, norm_is_whole=False)
    assert result(ranks(norm=1.5), parts).grad_norm == 2.5
    assert result(ranks(), dataclasses.replace(STEP, has_norm=False)).grad_norm is None


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"norm": 2.001}, "rank 1 has gradient norm 2.001, rank 0 has 2"),
        ({"norm": math.nan}, "rank 1 has gradient norm nan"),
        ({"lr": math.nan}, "rank 1 has learning rate nan"),
        ({"lr": 0.2}, "rank 1 has learning rate 0.2, rank 0 has 0.1"),
        ({"expected": 7}, "rank 1: the loss counted 6 targets where 7 were expected"),
    ],
)
def test_ranks_that_disagree_fail(second: dict[str, float], said: str) -> None:
    with pytest.raises(RunError) as failed:
        result(ranks(**second))
    assert said in str(failed.value)


def test_steps_come_back_in_order_whatever_was_sent_together() -> None:
    queue = StepQueue(torch.device("cpu"))
    for number in range(5):
        rows = [local_row(float(number), torch.tensor(2.0), digest=(2**32 - 1) * HALF + 7)]
        queue.add(dataclasses.replace(STEP, number=number, rows=rows * 2))
        if number in (1, 2):
            queue.send(40 + number)
    assert queue.sent() == [42]
    taken = list(queue.take())
    assert [step.number for step, _ in taken] == [0, 1, 2], "two were not sent"
    assert [(len(rows), rows[1].loss_sum, rows[0].digest) for _, rows in taken] == [
        (2, float(n), (2**32 - 1) * HALF + 7) for n in range(3)
    ]
    queue.send()
    assert [step.number for step, _ in queue.take()] == [3, 4] and not list(queue.take())


def test_an_engine_s_results_come_a_step_later_or_when_they_are_waited_for() -> None:
    micro_batches, layers = [], [nn.Linear(8, 3)]
    for n in (5, 3):
        inputs, targets = torch.randn(n, 8), torch.randint(3, (n,))
        micro_batches.append(hybrid.MicroBatch(inputs, targets, torch.arange(n)))
    with torch.no_grad():
        first = sum(cross_entropy(layers[0](mb.input), mb.target)[0] for mb in micro_batches) / 8
    job = small_job(model__name="own", data__name="own", optimizer__lr=0.1)
    engine = hybrid.open_engine(job, "single", layers, cross_entropy)
    engine.start_step(micro_batches)
    assert engine.results(wait=False) == []
    engine.start_step(micro_batches)
    (late,) = engine.results(wait=False)
    assert late.loss == pytest.approx(float(first)) and late.targets == 8
    (last,) = engine.results()
    assert last.loss < late.loss and engine.results() == []
    assert engine.train_step(micro_batches).loss < last.loss
    hybrid.cleanup()


def run(strategy: str, out: Path, nproc: int = 4, **changes: Any) -> Record:
    """Run the small job without the checks of a comparison."""
    return launch(small_job(**changes), strategy, nproc, out, Watcher())


def calls(record: Record, op: str) -> float:
    assert record.comm is not None
    return record.comm.by_op[op]["calls"][1] if op in record.comm.by_op else 0.0


def test_ranks_exchange_one_row_a_step_or_one_in_several_steps(tmp_path: Path) -> None:
    every_step = run("ddp", tmp_path / "each", train__steps=21)
    assert calls(every_step, "all_gather") == 1 and calls(every_step, "broadcast") == 0
    seldom = run("ddp", tmp_path / "seldom", train__steps=21, log__every=10)
    assert calls(seldom, "all_gather") == 0, "the counted step is not one that sends"
    assert [s.loss for s in seldom.steps] == [s.loss for s in every_step.steps]
    logged = [s.step for s in seldom.steps if s.grad_norm is not None]
    assert logged == [0, 9, 19, 20]


def test_no_stage_waits_for_the_loss_unless_deepspeed_writes_it(tmp_path: Path) -> None:
    silent = run("pipeline", tmp_path / "silent")
    assert calls(silent, "all_gather") == 1 and calls(silent, "broadcast") == 0
    written = tmp_path / "written"
    monitor = {"enabled": True, "output_path": str(written), "job_name": "seen"}
    config = tmp_path / "monitor.json"
    config.write_text(json.dumps({"csv_monitor": monitor}))
    told = run("pipeline", tmp_path / "told", strategy__pipeline={"ds_config": str(config)})
    assert calls(told, "broadcast") == 1 and [s.loss for s in told.steps] == [
        s.loss for s in silent.steps
    ]
    (losses,) = written.rglob("*train_loss*.csv")
    assert len(losses.read_text().splitlines()) > len(told.steps)


def watching(folder: str) -> Any:
    """A model that writes, in an evaluation, how many times DeepSpeed's pipeline has noted."""

    class Watching(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            live = [o for o in gc.get_objects() if type(o).__name__ == "PipelineEngine"]
            if live and not self.training:
                timers = live[0].timers.get_timers().values()
                text = str(sum(len(timer.event_timers) for timer in timers))
                Path(folder, f"notes{torch.distributed.get_rank()}").write_text(text)
            return super().forward(x)

    torch.manual_seed(0)
    return [Watching(32, 11), Watching(11, 10)], cross_entropy


def test_no_stage_keeps_the_time_of_each_step(tmp_path: Path) -> None:
    model = {"name": "tests.test_step_queue:watching", "options": {"folder": str(tmp_path)}}
    run("pipeline", tmp_path / "run", 2, model=model)
    assert [(tmp_path / f"notes{rank}").read_text() for rank in range(2)] == ["0", "0"]


def test_counts_that_the_plan_does_not_tell_are_exchanged(tmp_path: Path) -> None:
    ignoring = {"name": "tests.test_step_queue:ignoring"}
    result = hybrid.compare(
        small_job(data=ignoring, train__global_batch=21, train__steps=8),
        ["ddp", "fsdp", "zero2", "pipeline"],
        nproc=4,
        out=tmp_path,
    )
    assert result.ok
    single = result.strategies["single"]
    assert any(s.targets != s.samples for s in single.steps), "some targets do not count"
    assert calls(result.strategies["ddp"], "all_gather") == 1, "with the numbers of the step before"


def ignoring() -> tuple[TensorDataset, TensorDataset]:
    """The small job's sets, with targets that do not count, more in some shares than in others."""
    from hybrid.data.random import random

    train, test = random(samples=100, test_samples=37, features=32)
    train.tensors[1][: len(train) // 3] = -100
    return train, test


def with_buffers(changing_on: int | None = None, from_step: int = 0) -> Any:
    """A model with a buffer that never changes, or changes on one rank (-1: on all) at a step."""
    torch.manual_seed(0)
    return [Shift(changing_on, from_step), nn.Linear(32, 10)], cross_entropy


class Shift(nn.Module):
    def __init__(self, changing_on: int | None, from_step: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(3))
        self.changing_on, self.left = changing_on, from_step * 2  # micro-batches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.training and self.changing_on in (-1, rank):
            self.left -= 1
            if self.left < 0:
                self.shift.mul_(0.5)
        return x + self.shift[0] * 1e-3


@pytest.mark.parametrize(("changing_on", "broadcasts"), [(None, 0), (-1, 1), (3, 1)])
def test_ddp_sends_buffers_only_where_they_change(
    changing_on: int | None, broadcasts: int, tmp_path: Path
) -> None:
    model = {"name": "tests.test_step_queue:with_buffers", "options": {"changing_on": changing_on}}
    if changing_on is None:
        del model["options"]
    record = run("ddp", tmp_path, model=model)
    assert calls(record, "broadcast") == broadcasts


def test_a_buffer_that_changes_later_is_named(tmp_path: Path) -> None:
    options = {"changing_on": 3, "from_step": 3}
    model = {"name": "tests.test_step_queue:with_buffers", "options": options}
    with pytest.raises(RunFailed, match=r"step 3: the buffer 0\.shift changed.*= 'always'"):
        run("ddp", tmp_path / "told", model=model)
    record = run("ddp", tmp_path, model=model, strategy__ddp={"broadcast_buffers": "always"})
    assert calls(record, "broadcast") == 1


def with_dropout() -> Any:
    """A model that computes otherwise in an evaluation."""
    torch.manual_seed(0)
    return [nn.Linear(32, 24), nn.Dropout(0.5), nn.Linear(24, 10)], cross_entropy


def test_training_goes_on_as_before_after_an_evaluation(tmp_path: Path) -> None:
    result = hybrid.compare(
        small_job(model={"name": "tests.test_step_queue:with_dropout"}, train__eval_every=2),
        ["ddp", "zero1", "zero3", "pipeline"],
        nproc=2,
        out=tmp_path,
    )
    assert result.ok
    losses = [step.loss for step in result.strategies["single"].steps]
    still = hybrid.compare(
        small_job(model={"name": "tests.test_step_queue:with_dropout"}),
        ["single"],
        nproc=1,
        out=tmp_path,
    )
    assert [step.loss for step in still.strategies["single"].steps] == losses
