"""This module makes the job's optimizer, sets its learning rate, clips, and scales fp16's loss."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..job.errors import RunError, Unsupported
from ..job.schema import Job
from ..models.layers import Layers
from .precision import GROWTH_STEPS, INITIAL_SCALE
from .state import local_part


def build_optimizer(
    job: Job, parameters: Mapping[str, nn.Parameter], no_decay: Collection[str], num_groups: int = 1
) -> torch.optim.Optimizer:
    """Build the job's optimizer over the trained ones of `parameters` (by canonical name).

    Parameters named in `no_decay` have no weight decay. There are at least `num_groups` parameter
    groups; raises Unsupported where there are too few parameters for that.

    AdamW is fused, except under fp16: fused AdamW unscales gradients itself and does not see
    overflows in other ranks' shards."""
    o = job.optimizer
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    decayed = [p for n, p in trained.items() if n not in no_decay]
    kept = [p for n, p in trained.items() if n in no_decay]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": o.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    while len(groups) < num_groups:
        groups.append(_split_off(max(groups, key=lambda group: len(group["params"]))))
    if o.name == "sgd":
        return torch.optim.SGD(groups, o.lr, momentum=o.momentum)
    fused = job.train.precision != "fp16"
    return torch.optim.AdamW(groups, o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, fused=fused)


def _split_off(group: dict[str, Any]) -> dict[str, Any]:
    """Move the last parameter of a group into a new group like it."""
    if len(group["params"]) == 1:
        raise Unsupported(
            "a stage trains one tensor alone: with optimizer.no_decay each stage needs two; cut "
            "elsewhere, use fewer stages, or leave no_decay out"
        )
    return group | {"params": [group["params"].pop()]}


def count_groups(layers: Layers, no_decay: Collection[str]) -> int:
    """Count the parameter groups of the whole model's optimizer."""
    return len({name in no_decay for p, name in layers.names().items() if p.requires_grad})


def no_decay_names(layers: Layers, no_decay: Collection[str]) -> set[str]:
    """Return canonical names of the parameters of some kinds: norms, biases or embeddings.

    `layers` must be the whole model, since a tied parameter is of every kind that one of its places
    is."""
    names, found = layers.names(), set()
    for module in layers.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if _kinds(module, name) & set(no_decay):
                found.add(names[parameter])
    return found


def _kinds(module: nn.Module, name: str) -> set[str]:
    """Return the kinds of a module's parameter.
    A norm is known by its class name, since each library has norms of its own."""
    kinds = set()
    if "norm" in type(module).__name__.lower():
        kinds.add("norms")
    if name == "bias" or name.endswith("_bias"):
        kinds.add("biases")
    if isinstance(module, nn.Embedding):
        kinds.add("embeddings")
    return kinds


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Give every parameter group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def read_learning_rate(optimizer: Any) -> float:
    """Return the live optimizer's learning rate; raises RunError if its groups differ in it."""
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) != 1:
        raise RunError(f"parameter groups have different learning rates: {sorted(rates)}")
    return rates.pop()


def global_norm(parameters: Iterable[nn.Parameter], group: Any = None) -> float:
    """Return the norm of the gradients of all `parameters` together; collective.

    FSDP2's shards on other ranks count too, and so do the other parameters that the ranks of
    `group` hold.

    The sum is in float64: on a CPU, torch's own fp32 norm of half a million elements is 5e-6 too
    small, but not that of their shards, and clipping would turn this into a difference of training.
    """
    square, shards = torch.zeros((), dtype=torch.float64), None
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            (axis,) = (i for i, p in enumerate(gradient.placements) if p.is_shard())
            shards = gradient.device_mesh.get_group(axis)
        norm = torch.linalg.vector_norm(local_part(gradient), dtype=torch.float64)
        square = square.to(norm.device) + norm.square()
    for over in (shards, group):
        if over is not None:
            dist.all_reduce(square, group=over)
    return float(square.sqrt())


def clip(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale gradients whose global norm is `norm` so that it is at most `limit`; 0 switches it off.

    The 1e-6 is that of `torch.nn.utils.clip_grad_norm_`, and DeepSpeed's. Without it, each clipped
    step would differ from theirs by 1e-6 / norm."""
    factor = limit / (norm + 1e-6)
    if limit and factor < 1:
        for parameter in parameters:
            if parameter.grad is not None:
                local_part(parameter.grad).mul_(factor)


class LossScale(torch.amp.GradScaler):
    """Scales the loss under fp16; otherwise it changes nothing."""

    unscale = torch.amp.GradScaler.unscale_  # before gradients are measured and clipped

    def __init__(self, job: Job, device: torch.device) -> None:
        fp16 = job.train.precision == "fp16"
        super().__init__(device.type, INITIAL_SCALE, growth_interval=GROWTH_STEPS, enabled=fp16)

    @property
    def value(self) -> float:
        """Return the scale in force; 1 without fp16."""
        return self.get_scale()

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step, unless a gradient overflowed, and update the scale."""
        result = super().step(optimizer, *args, **kwargs)
        self.update()
        return result
