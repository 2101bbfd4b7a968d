"""This module makes the job's optimizer, sets its learning rate, clips, and scales fp16's loss."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..job.errors import RunError, Unsupported
from ..job.schema import Job
from ..models.layers import Layers
from .optimizer_numbers import note_groups
from .own_optimizer import call_optimizer, is_own
from .precision import GROWTH_STEPS, INITIAL_SCALE
from .state import local_part

AT_ONCE = 16  # or 8 or 4, by the processor: aten/src/ATen/native/cpu/FusedAdamKernel.cpp


def build_optimizer(
    job: Job,
    parameters: Mapping[str, nn.Parameter],
    no_decay: Collection[str],
    num_groups: int = 1,
    flat_ties: bool = False,
) -> torch.optim.Optimizer:
    """Build the job's optimizer over the trained ones of `parameters` (by canonical name).

    Parameters named in `no_decay` have no weight decay. There are at least `num_groups` parameter
    groups; raises Unsupported where there are too few parameters for that.

    AdamW is fused, except under fp16: fused AdamW unscales gradients itself and does not see
    overflows in other ranks' shards. Nor is it where other ranks step copies of a parameter in flat
    buffers and it would round each by its place there (flat_ties; see `rounds_by_place`): they
    would drift apart."""
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
    if is_own(job):
        return note_groups(call_optimizer(job, groups))
    if o.name == "sgd":
        return torch.optim.SGD(groups, o.lr, momentum=o.momentum)
    fused = job.train.precision != "fp16" and not flat_ties
    return torch.optim.AdamW(groups, o.lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, fused=fused)


def rounds_by_place(layers: Layers, num_shares: int) -> bool:
    """Tell whether fused AdamW may round a number otherwise for its place in a flat buffer.

    The buffer has any of the trained parameters, and is cut into equal shares. On a CPU, AdamW
    steps `AT_ONCE` numbers together, and the last few of a tensor one by one."""
    trained = (p for p in layers.names() if p.requires_grad)
    return any(p.numel() % (AT_ONCE * num_shares) for p in trained)


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


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]


BLOCK = 2**12  # elements that are summed in fp32
ROWS = range(32, 4 * BLOCK)  # lengths of rows that are blocks themselves


def norm_of(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the norm of this rank's part of all gradients together, float64 [].

    Blocks are summed in fp32, and their norms in float64: on a CPU, torch's own fp32 norm of half a
    million elements is 5e-6 too small, but not that of their shards, and clipping would turn this
    into a difference of training. In blocks the error is 1e-8, at a twentieth of the time that
    float64 takes."""
    return length(*(local_part(p.grad) for p in parameters if p.grad is not None))


def length(*tensors: torch.Tensor) -> torch.Tensor:
    """Return the norm of all elements together, float64 [], as `norm_of` says."""
    small, blocks = [], []
    for tensor in tensors:
        if tensor.dim() == 2 and tensor.shape[1] in ROWS:
            blocks.append(torch.linalg.vector_norm(tensor, dim=1))
            continue
        cut = tensor.numel() // BLOCK * BLOCK
        if cut:
            tensor = tensor.reshape(-1)
            blocks.append(torch.linalg.vector_norm(tensor[:cut].view(-1, BLOCK), dim=1))
            tensor = tensor[cut:]
        if tensor.numel():
            small.append(tensor)
    if small:
        blocks.append(torch.stack(torch._foreach_norm(small)))
    if not blocks:
        return torch.zeros((), dtype=torch.float64)
    norms = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return torch.linalg.vector_norm(norms, dtype=torch.float64)


def shard_groups(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Return the process groups in which FSDP2 shards parameters; none where it shards nothing."""
    groups = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            (axis,) = (i for i, p in enumerate(parameter.placements) if p.is_shard())
            group = parameter.device_mesh.get_group(axis)
            if group not in groups:
                groups.append(group)
    return groups


def clip(parameters: Iterable[nn.Parameter], norm: torch.Tensor, limit: float) -> None:
    """Scale gradients whose global norm is `norm` ([]) so that it is at most `limit`.

    The host does not read the norm: gradients within the limit are multiplied by 1. The 1e-6 is
    that of `torch.nn.utils.clip_grad_norm_`, and DeepSpeed's. Without it, each clipped step would
    differ from theirs by 1e-6 / norm."""
    gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


class LossScale(torch.amp.GradScaler):
    """Scales the loss under fp16; otherwise it changes nothing.

    averaged_over: the ranks over which a reduction averages gradients that are to be summed. Under
    fp16 they are multiplied by that number after it: a loss so much larger would overflow sooner
    than that of one process."""

    def __init__(self, job: Job, device: torch.device, averaged_over: int = 1) -> None:
        fp16 = job.train.precision == "fp16"
        super().__init__(device.type, INITIAL_SCALE, growth_interval=GROWTH_STEPS, enabled=fp16)
        self.averaged_over = averaged_over
        self.active = fp16  # plain to read: `is_enabled` is a call in each micro-batch

    @property
    def loss_factor(self) -> int:
        """Return what the loss is multiplied by so that averaged gradients are the sum."""
        return 1 if self.active else self.averaged_over

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Give gradients their size, before they are measured and clipped."""
        self.unscale_(optimizer)
        if self.averaged_over > 1:
            for parameter in parameters_of(optimizer):
                if parameter.grad is not None:
                    parameter.grad.mul_(self.averaged_over)

    @property
    def value(self) -> float:
        """Return the scale in force; 1 without fp16."""
        return self.get_scale() if self.active else 1.0

    def read_state(self) -> dict[str, float] | None:
        """Return the scale, and for how many steps without an overflow it has been in force."""
        if not self.active:
            return None
        state = self.state_dict()
        return {"scale": float(state["scale"]), "good_steps": int(state["_growth_tracker"])}

    def set_state(self, state: Mapping[str, float] | None) -> None:
        """Take over what `read_state` returned."""
        if self.active and state:
            kept = {"scale": state["scale"], "_growth_tracker": int(state["good_steps"])}
            self.load_state_dict(self.state_dict() | kept)

    def leave(self) -> None:
        """Forget gradients that were unscaled for a step that is not made."""
        if self.active:
            self._per_optimizer_states.clear()

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step, unless a gradient overflowed, and update the scale."""
        result = super().step(optimizer, *args, **kwargs)
        self.update()
        return result


def finish_step(optimizer: torch.optim.Optimizer, scale: LossScale, held: bool = False) -> None:
    """Make the update, unless the guard holds it back, and drop the gradients."""
    if held:
        scale.leave()
    elif scale.active:
        scale.step(optimizer)
    else:
        optimizer.step()
    drop_gradients(optimizer)


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Drop all gradients, as `zero_grad` of torch does; a class with one of its own has it called.

    What torch's does beside that, for profilers, takes a step of a small model 30 us (LOG.md)."""
    own = type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad
    if own or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
