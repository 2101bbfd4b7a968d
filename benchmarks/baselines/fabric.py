"""The same loop in Lightning Fabric, as its documentation shows it."""

import os
from collections.abc import Callable
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn

from .fsdp import shard, whole
from .workloads import Workload, due_once_in, read

STRATEGIES = ("single", "ddp", "fsdp")  # its DeepSpeed strategy needs a GPU


def make(workload: Workload, reads: int = 0) -> Callable[[], Any]:
    """Return a function that makes one optimizer step and returns its losses.
    reads: once in so many steps it also takes the gradient norm, and reads that and the loss as
    numbers; 0: never."""
    fabric = make_fabric(workload)
    model: Any = nn.Sequential(*workload.layers())
    optimizer: Any
    if workload.strategy == "fsdp":
        model = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(workload.optimizer(model.parameters()))
    else:
        model, optimizer = fabric.setup(model, workload.optimizer(model.parameters()))
    schedule = workload.schedule(optimizer.optimizer)
    next_batches, clip_norm = workload.micro_batches(), workload.clip_norm
    model.train()
    dues = due_once_in(reads)

    def step() -> Any:
        due = next(dues)
        losses, norm = [], None
        for k, (inputs, targets) in enumerate(next_batches()):
            with fabric.no_backward_sync(model, enabled=k < workload.accumulation - 1):
                loss = workload.loss(model(inputs), targets)
                fabric.backward(loss / workload.accumulation)
            losses.append(loss)
        if clip_norm:
            norm = fabric.clip_gradients(model, optimizer, max_norm=clip_norm)
        elif due:
            norm = nn.utils.get_total_norm(p.grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        return read(losses, whole(norm)) if due else losses

    return step


def make_fabric(workload: Workload) -> Any:
    """Return a Fabric for the strategy, in the processes that torchrun has started."""
    os.environ.setdefault("GROUP_RANK", "0")
    strategy: Any = "auto" if workload.strategy == "single" else "ddp"
    if workload.strategy == "fsdp":
        strategy = ModelParallelStrategy(
            parallelize_fn=lambda model, mesh: shard(model, workload, mesh["data_parallel"]),
            data_parallel_size=workload.world_size,
            tensor_parallel_size=1,
        )
    fabric = Fabric(accelerator="cpu", devices=workload.world_size, strategy=strategy)
    fabric.launch()
    return fabric
