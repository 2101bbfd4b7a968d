"""A hand-written local SGD: each rank steps alone, and torch's averager merges the parameters.

The documentation of `torch.distributed.algorithms.model_averaging` shows the averager so.
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from .workloads import SYNC_EVERY, Workload, read


def make(workload: Workload, reads: bool = False) -> Callable[[], Any]:
    """Return a function that makes one optimizer step and returns its losses.
    reads: it also takes the gradient norm, and reads that and the loss as numbers."""
    model = nn.Sequential(*workload.layers())
    optimizer = workload.optimizer(model.parameters())
    schedule = workload.schedule(optimizer)
    with warnings.catch_warnings(action="ignore"):  # it advises against merging after every step
        averager = PeriodicModelAverager(SYNC_EVERY, warmup_steps=SYNC_EVERY - 1)
    next_batches, clip_norm = workload.micro_batches(), workload.clip_norm
    model.train()

    def step() -> Any:
        losses, norm = [], None
        for inputs, targets in next_batches():
            loss = workload.loss(model(inputs), targets)
            (loss / workload.accumulation).backward()
            losses.append(loss)
        if clip_norm:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        elif reads:
            norm = nn.utils.get_total_norm(p.grad for p in model.parameters())
        optimizer.step()
        averager.average_parameters(model.parameters())
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        return read(losses, norm) if reads else losses

    return step
