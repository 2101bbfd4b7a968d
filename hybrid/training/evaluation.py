"""The only evaluation: every test sample once, on whatever an engine runs, as one process would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..data.batches import BatchPlan
from ..data.loader import MicroBatch, load_micro_batch
from ..engines.protocol import Engine
from ..job.errors import RunError
from ..job.schema import Job
from ..records import EvalResult


def evaluate(engine: Engine, samples: Sequence[Any], job: Job, micro_batches: int) -> EvalResult:
    """Loss and counts of `samples` under an engine; collective. RunError unless each sample was
    counted once."""
    plan = BatchPlan(len(samples), job.train.global_batch, engine.layout.dp, micro_batches, None)
    result = engine.evaluate(batches(plan, engine, samples))
    if result.samples != len(samples):
        raise RunError(f"evaluation counted {result.samples} of {len(samples)} samples")
    return result


def batches(plan: BatchPlan, engine: Engine, samples: Sequence[Any]) -> Iterator[list[MicroBatch]]:
    """One epoch of this process's micro-batches, a list a global batch."""
    for step in range(plan.steps_per_epoch):
        yield step_batches(plan, engine, samples, step)


def step_batches(
    plan: BatchPlan, engine: Engine, samples: Sequence[Any], step: int
) -> list[MicroBatch]:
    """This process's micro-batches of one step, share after share."""
    return [
        load_micro_batch(samples, ids, engine.micro_batch_size)
        for share in engine.shares
        for ids in plan.micro_batch_ids(step, share)
    ]
