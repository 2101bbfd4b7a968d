"""A pipeline of `torch.distributed.pipelining` under its 1F1B schedule, as its documentation shows.

It knows no tied weights: for the GPT the loop sums their gradients over the two stages itself.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from .workloads import Workload, read

STRATEGIES = ("pipeline",)


def make(workload: Workload, reads: bool = False) -> Callable[[], Any]:
    """Return a function that makes one optimizer step and returns its losses.
    reads: it also takes the stage's gradient norm, and reads that and the loss as numbers."""
    layers, last = workload.layers(), workload.rank == workload.stages - 1
    half = len(layers) // workload.stages
    model = nn.Sequential(*(layers[half:] if last else layers[:half]))
    stage = PipelineStage(model, workload.rank, workload.stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, workload.accumulation, loss_fn=workload.loss)
    optimizer = workload.optimizer(model.parameters())
    rates = workload.schedule(optimizer)
    inputs, targets, _ = (torch.cat(parts) for parts in zip(*workload.fixed(), strict=True))
    tied: Any = None
    if workload.name == "gpt":
        end: Any = model[-1 if last else 0]
        tied = end.logits.weight if last else end.token.weight
    model.train()

    def step() -> Any:
        losses: list[torch.Tensor] = []
        if last:
            schedule.step(target=targets, losses=losses)
        else:
            schedule.step(inputs)
        if tied is not None:
            dist.all_reduce(tied.grad)
        norm = nn.utils.get_total_norm(p.grad for p in model.parameters()) if reads else 0.0
        optimizer.step()
        optimizer.zero_grad()
        if rates:
            rates.step()
        return read(losses, norm) if reads and last else losses

    return step
