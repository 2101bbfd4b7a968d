"""A hand-written loop under torch's FSDP2, as the documentation of `fully_shard` shows it.

Each layer is a unit, and so is the whole model. Layers that share a parameter belong to the whole
model's unit. Gradients are reduced with the last micro-batch alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from .workloads import Workload, read


def make(workload: Workload, reads: bool = False) -> Callable[[], Any]:
    """Return a function that makes one optimizer step and returns its losses.
    reads: it also takes the gradient norm, and reads that and the loss as numbers."""
    model: Any = shard(nn.Sequential(*workload.layers()), workload)
    optimizer = workload.optimizer(model.parameters())
    schedule = workload.schedule(optimizer)
    next_batches, clip_norm = workload.micro_batches(), workload.clip_norm
    model.train()

    def step() -> Any:
        losses, norm = [], None
        for k, (inputs, targets) in enumerate(next_batches()):
            model.set_requires_gradient_sync(k == workload.accumulation - 1)
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
        return read(losses, whole(norm)) if reads else losses

    return step


def shard(model: nn.Sequential, workload: Workload, mesh: Any = None) -> nn.Sequential:
    """Shard a model over all ranks, or over `mesh`."""
    mesh = mesh or init_device_mesh("cpu", (workload.world_size,))
    tied = (0, len(model) - 1) if workload.name == "gpt" else ()
    for i, layer in enumerate(model):
        if i not in tied:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(norm: torch.Tensor | None) -> Any:
    """Return the norm over all shards."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
