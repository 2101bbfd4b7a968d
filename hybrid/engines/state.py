"""A live model's tensors by name, what of them a rank holds, and tensors moved to its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..data.loader import MicroBatch
from ..job.errors import JobError
from .precision import names_of, plain_name


def on_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch with its inputs and targets on `device`."""
    inputs, target = to_device(micro_batch.input, device), to_device(micro_batch.target, device)
    return MicroBatch(inputs, target, micro_batch.ids)


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple, list or dict of them, on `device`."""
    if isinstance(value, Mapping):
        return {key: to_device(v, device) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, device) for v in value)
    return value.to(device, non_blocking=True)


def gradient_dtypes(model: nn.Module) -> str:
    """What the gradients that a model holds are stored in."""
    return names_of(p.grad for p in model.parameters() if p.grad is not None)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model, by canonical name."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {plain_name(name): tensor for name, tensor in found.items()}


def num_held(model: nn.Module) -> int:
    """How many trained parameters of a live model this rank holds; of a sharded one, its shard."""
    held = 0
    for p in model.parameters():
        if p.requires_grad:
            local = p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p)
            held += local.numel()
    return held


def copy_of_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model that is whole on this rank, copied to the CPU."""
    return {name: t.detach().cpu().clone() for name, t in named_tensors(model).items()}


def copy_state(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Copy `state` into `tensors` of the same names; JobError where names or shapes differ."""
    if tensors.keys() != state.keys():
        raise JobError(f"the state's tensors are not the model's: {sorted(tensors ^ state.keys())}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != state[name].shape:
                raise JobError(
                    f"{name}: the state has shape {list(state[name].shape)}, "
                    f"the model {list(tensor.shape)}"
                )
            tensor.copy_(state[name])
