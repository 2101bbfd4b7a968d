"""Evaluates an engine on every test sample once, as one process would; the only evaluation."""

from collections.abc import Sequence
from typing import Any

from ..data.batches import BatchPlan
from ..data.steps import StepLoader
from ..engines.protocol import Engine
from ..job.errors import RunError
from ..job.schema import Job
from ..records import EvalResult


def evaluate(
    engine: Engine, samples: Sequence[Any], job: Job, micro_batches: int | None = None
) -> EvalResult:
    """Return the loss and the counts of all `samples` under an engine; collective.

    micro_batches: pieces that each share of a batch is cut into; left out, the job's
    `train.micro_batches`. Raises RunError unless each sample was counted once."""
    micro_batches = micro_batches or job.train.micro_batches
    plan = BatchPlan(len(samples), job.train.global_batch, engine.layout.dp, micro_batches, None)
    loader = make_loader(plan, engine, samples)
    result = engine.evaluate(map(loader.step, range(plan.steps_per_epoch)))
    if result.samples != len(samples):
        raise RunError(f"evaluation counted {result.samples} of {len(samples)} samples")
    return result


def make_loader(
    plan: BatchPlan, engine: Engine, samples: Sequence[Any], known: int | None = None
) -> StepLoader:
    """Make the loader of what this process's engine needs; known: the targets of each sample."""
    return StepLoader(
        plan,
        samples,
        engine.shares,
        engine.micro_batch_size,
        engine.reads_inputs,
        engine.reads_targets,
        known,
    )
