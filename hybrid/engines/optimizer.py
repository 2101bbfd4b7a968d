"""The job's optimizer, its parameter groups, its learning rate, and fp16's loss scale."""

from __future__ import annotations

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


def build_optimizer(
    job: Job, parameters: Mapping[str, nn.Parameter], no_decay: Collection[str], num_groups: int = 1
) -> torch.optim.Optimizer:
    """The job's optimizer over the trained ones of `parameters` (by canonical name), without weight
    decay for those named in `no_decay`, in at least `num_groups` parameter groups.

    AdamW is fused, except under fp16: fused AdamW unscales gradients itself and does not see
    overflows in other ranks' shards.
    """
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
    """The last parameter of a group as a group like it."""
    if len(group["params"]) == 1:
        raise Unsupported(
            "a stage trains one tensor alone: with optimizer.no_decay each stage needs two; cut "
            "elsewhere, use fewer stages, or leave no_decay out"
        )
    return group | {"params": [group["params"].pop()]}


def count_groups(layers: Layers, no_decay: Collection[str]) -> int:
    """Parameter groups of the whole model's optimizer."""
    return len({name in no_decay for p, name in layers.names().items() if p.requires_grad})


def no_decay_names(layers: Layers, no_decay: Collection[str]) -> set[str]:
    """Canonical names of the parameters of the `no_decay` kinds, norms, biases or embeddings. To be
    asked of the whole model: a tied parameter is of every kind that one of its places is."""
    names, found = layers.names(), set()
    for module in layers.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if _kinds(module, name) & set(no_decay):
                found.add(names[parameter])
    return found


def _kinds(module: nn.Module, name: str) -> set[str]:
    """What a parameter of a module is: norms go by their class name, since each library has its
    own."""
    kinds = set()
    if "norm" in type(module).__name__.lower():
        kinds.add("norms")
    if name == "bias" or name.endswith("_bias"):
        kinds.add("biases")
    if isinstance(module, nn.Embedding):
        kinds.add("embeddings")
    return kinds


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Give every parameter group the rate of the step that comes."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def read_learning_rate(optimizer: Any) -> float:
    """The rate that the live optimizer holds; RunError where its groups differ."""
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) != 1:
        raise RunError(f"parameter groups have different learning rates: {sorted(rates)}")
    return rates.pop()


def global_norm(parameters: Iterable[nn.Parameter], group: Any = None) -> float:
    """The norm of all gradients of `parameters` together, shards of FSDP2 and their other shards
    included; over the ranks of `group` as well, which hold other parameters; collective.

    In float64: torch's own fp32 norm of half a million elements on a CPU is 5e-6 too small, which
    of shards it is not, and which clipping then makes a difference of the training.
    """
    square, shards = torch.zeros((), dtype=torch.float64), None
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            (axis,) = (i for i, p in enumerate(gradient.placements) if p.is_shard())
            shards, gradient = gradient.device_mesh.get_group(axis), gradient.to_local()
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        square = square.to(norm.device) + norm.square()
    for over in (shards, group):
        if over is not None:
            dist.all_reduce(square, group=over)
    return float(square.sqrt())


def clip(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale gradients whose global norm is `norm` so that it is at most `limit`; 0: leave them.
    With the 1e-6 of `torch.nn.utils.clip_grad_norm_`, which DeepSpeed has too: left out, each
    clipped step is 1e-6 / norm apart from theirs."""
    factor = limit / (norm + 1e-6)
    if limit and factor < 1:
        for parameter in parameters:
            if parameter.grad is not None:
                gradient: Any = parameter.grad
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                local.mul_(factor)


class LossScale:
    """fp16's loss scaling by torch's `GradScaler`; without fp16 it passes everything through."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=INITIAL_SCALE,
            growth_interval=GROWTH_STEPS,
            enabled=job.train.precision == "fp16",
        )

    @property
    def value(self) -> float:
        """The scale in force; 1 without fp16."""
        return self.scaler.get_scale()

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss that backward is to start from."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients back to their size, before they are measured and clipped."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step, unless a gradient overflowed, and update the scale."""
        self.scaler.step(optimizer)
        self.scaler.update()
