"""hybrid's engine alone, as people with their own loop use it: `open_engine`, then its steps."""

import itertools
from collections.abc import Callable
from typing import Any

import hybrid

from .workloads import COMPARED, LOG_EVERY, Workload, build


def make(workload: Workload, reads: bool = False) -> Callable[[], Any]:
    """Return a function that makes one optimizer step, on micro-batches made once.

    reads: it waits for the result of each step, which has the loss and the gradient norm.
    Otherwise it takes the results that have come; the first are waited for, to be compared."""
    job = hybrid.load_job(workload.job(log_every=1 if reads else LOG_EVERY))
    layers, loss = build(workload.name, workload.stages > 1)
    engine: Any = hybrid.open_engine(job, workload.strategy, layers, loss)
    each = workload.num_targets // (workload.columns * workload.accumulation)
    batches = [hybrid.MicroBatch(*parts, num_targets=each) for parts in workload.fixed()]
    steps, count, samples = itertools.count(), workload.num_targets, workload.batch

    def step() -> list[float]:
        engine.start_step(batches, count, samples)
        wait = reads or next(steps) < COMPARED
        return [result.loss for result in engine.results(wait)]

    return step
