"""A hand-written loop under torch's DistributedDataParallel, as its documentation shows it.

DDP has its default settings: the buckets are no views of the gradients (hybrid's are), and buffers
are broadcast. Gradients are accumulated under `no_sync`.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .workloads import Workload, read


def make(workload: Workload, reads: bool = False) -> Callable[[], Any]:
    """Return a function that makes one optimizer step and returns its losses.
    reads: it also takes the gradient norm, and reads that and the loss as numbers."""
    model = DistributedDataParallel(nn.Sequential(*workload.layers()))
    optimizer = workload.optimizer(model.parameters())
    schedule = workload.schedule(optimizer)
    next_batches, clip_norm = workload.micro_batches(), workload.clip_norm
    model.train()

    def step() -> Any:
        losses, norm = [], None
        for k, (inputs, targets) in enumerate(next_batches()):
            last = k == workload.accumulation - 1
            with contextlib.nullcontext() if last else model.no_sync():
                loss = workload.loss(model(inputs), targets)
                (loss / workload.accumulation).backward()
            losses.append(loss)
        if clip_norm:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        elif reads:
            norm = nn.utils.get_total_norm(p.grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        return read(losses, norm) if reads else losses

    return step
