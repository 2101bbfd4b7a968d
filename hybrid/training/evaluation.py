"""Evaluates an engine on every test sample once, as one process would; the only evaluation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data.batches import BatchPlan
from ..data.collation import find_longest
from ..data.samples import JobSet
from ..data.steps import StepLoader
from ..data.workers import WorkerLoader
from ..engines.protocol import Engine
from ..job.errors import RunError
from ..job.schema import Job
from ..records import EvalResult


def evaluate(
    engine: Engine, samples: Sequence[Any], job: Job, micro_batches: int | None = None
) -> EvalResult:
    """Return the loss and the counts of all `samples` under an engine; collective.

    With `train.eval_batches` these are the first samples alone, of so many global batches: the same
    ones however they are shared out. micro_batches: pieces that each share of a batch is cut into;
    left out, the job's `train.micro_batches`. Raises RunError unless each sample was counted once.
    """
    micro_batches = micro_batches or job.train.micro_batches
    plan = BatchPlan(len(samples), job.train.global_batch, engine.layout.dp, micro_batches, None)
    steps = range(min(plan.steps_per_epoch, job.train.eval_batches or plan.steps_per_epoch))
    asked = min(len(steps) * job.train.global_batch, len(samples))
    loader = make_loader(job, plan, engine, samples, steps)
    result = engine.evaluate(map(loader.step, steps))
    loader.close()
    if result.samples != asked:
        raise RunError(f"evaluation counted {result.samples} of {asked} samples")
    return result if asked == len(samples) else replace(result, set_samples=len(samples))


def make_loader(
    job: Job,
    plan: BatchPlan,
    engine: Engine,
    samples: Sequence[Any],
    steps: range,
    known: int | None = None,
) -> StepLoader | WorkerLoader:
    """Make the loader of what this process's engine needs in `steps`, which come in order.

    known: the targets of each sample. The caller closes the loader; after an error `train` does.
    The first call is collective where the engine needs shapes that stay."""
    if engine.micro_batch_size is not None and isinstance(samples, JobSet):
        find_longest(samples, together=True)
    reads = engine.reads_inputs, engine.reads_targets
    alone = StepLoader(plan, samples, engine.shares, engine.micro_batch_size, *reads, known)
    if not job.data.workers or not any(reads):
        return alone
    return WorkerLoader(alone, steps, job.data.workers, pin=torch.cuda.is_initialized())
