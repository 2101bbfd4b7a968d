"""A hand-written loop under DeepSpeed's ZeRO, as its "Getting Started" shows it.

DeepSpeed divides the loss, clips, steps and moves the schedule by itself.
"""

from collections.abc import Callable
from typing import Any

import deepspeed
from torch import nn

from .workloads import Workload, read


def make(workload: Workload, reads: bool = False) -> Callable[[], Any]:
    """Return a function that makes one optimizer step and returns its losses.
    reads: it also reads the loss and DeepSpeed's gradient norm as numbers."""
    model = nn.Sequential(*workload.layers())
    optimizer = workload.optimizer(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=workload.schedule(optimizer),
        config=workload.deepspeed_config(stage=int(workload.strategy.removeprefix("zero"))),
        dist_init_required=False,
    )
    next_batches = workload.micro_batches()
    engine.train()

    def step() -> Any:
        losses = []
        for inputs, targets in next_batches():
            loss = workload.loss(engine(inputs), targets)
            engine.backward(loss)
            engine.step()
            losses.append(loss)
        return read(losses, engine.get_global_grad_norm()) if reads else losses

    return step
