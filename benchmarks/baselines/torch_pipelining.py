"""A pipeline of `torch.distributed.pipelining` under its 1F1B schedule, as its documentation shows.

It knows no tied weights: for the GPT the loop sums their gradients over the two stages itself.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from .workloads import Workload, due_once_in, make_samples, read

STRATEGIES = ("pipeline", "pipeline_torch")


def make(workload: Workload, reads: int = 0) -> Callable[[], Any]:
    """Return a function that makes one optimizer step and returns its losses.
    reads: once in so many steps it also takes the stage's gradient norm, and reads that and the
    loss as numbers; 0: never."""
    layers, last = workload.layers(), workload.rank == workload.stages - 1
    half = len(layers) // workload.stages
    model = nn.Sequential(*(layers[half:] if last else layers[:half]))
    stage = PipelineStage(model, workload.rank, workload.stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, workload.accumulation, loss_fn=workload.loss)
    optimizer = workload.optimizer(model.parameters())
    rates = workload.schedule(optimizer)
    next_batch = whole_batches(workload, last)
    tied: Any = None
    if workload.name == "gpt":
        end: Any = model[-1 if last else 0]
        tied = end.logits.weight if last else end.token.weight
    model.train()
    dues = due_once_in(reads)

    def step() -> Any:
        due = next(dues)
        losses: list[torch.Tensor] = []
        if last:
            schedule.step(target=next_batch(), losses=losses)
        else:
            schedule.step(next_batch())
        if tied is not None:
            dist.all_reduce(tied.grad)
        norm = nn.utils.get_total_norm(p.grad for p in model.parameters()) if due else 0.0
        optimizer.step()
        optimizer.zero_grad()
        if rates:
            rates.step()
        return read(losses, norm) if due and last else losses

    return step


def whole_batches(workload: Workload, last: bool) -> Callable[[], torch.Tensor]:
    """Return a function that gives a step's targets on the last stage, and its inputs elsewhere."""
    if not workload.loading:
        fixed = torch.cat([parts[last] for parts in workload.fixed()])
        return lambda: fixed
    samples, order = make_samples(workload.name).tensors[last], workload.order()
    steps = itertools.cycle(torch.tensor(order).view(-1, workload.batch))
    return lambda: samples[next(steps)]
