"""Evaluates an engine on every test sample once, as one process would; the only evaluation."""

from collections.abc import Sequence
from typing import Any

from ..data.batches import BatchPlan
from ..data.loader import MicroBatch, load_micro_batch
from ..engines.protocol import Engine
from ..job.errors import RunError
from ..job.schema import Job
from ..records import EvalResult


def evaluate(engine: Engine, samples: Sequence[Any], job: Job, micro_batches: int) -> EvalResult:
    """Return the loss and the counts of all `samples` under an engine; collective.
    Raises RunError unless each sample was counted once."""
    plan = BatchPlan(len(samples), job.train.global_batch, engine.layout.dp, micro_batches, None)
    steps = range(plan.steps_per_epoch)
    result = engine.evaluate(step_batches(plan, engine, samples, step) for step in steps)
    if result.samples != len(samples):
        raise RunError(f"evaluation counted {result.samples} of {len(samples)} samples")
    return result


def step_batches(
    plan: BatchPlan,
    engine: Engine,
    samples: Sequence[Any],
    step: int,
    targets_per_sample: int | None = None,
) -> list[MicroBatch]:
    """Load this process's micro-batches of one step, share after share.

    targets_per_sample: see `load_micro_batch`."""
    return [
        load_micro_batch(
            samples,
            ids,
            engine.micro_batch_size,
            inputs=engine.reads_inputs,
            targets=engine.reads_targets,
            targets_per_sample=targets_per_sample,
        )
        for share in engine.shares
        for ids in plan.micro_batch_ids(step, share)
    ]
