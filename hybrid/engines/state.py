"""This module reads a live model's tensors by name, and moves tensors to a device."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..data.loader import MicroBatch
from ..job.errors import JobError
from .precision import names_of, plain_names


def on_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return a micro-batch with its inputs and targets on `device`."""
    if device.type == "cpu":
        return micro_batch
    pair = micro_batch.input, micro_batch.target  # each a tensor, or a tuple, list or dict of them
    inputs, target = tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), pair)
    return dataclasses.replace(micro_batch, input=inputs, target=target)


def gradient_dtypes(parameters: Iterable[nn.Parameter]) -> str:
    """Return the dtypes of the gradients that parameters have, as one word."""
    return names_of(p.grad for p in parameters if p.grad is not None)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model by canonical name."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    moved = plain_names(model)
    return {moved.get(name, name): tensor for name, tensor in found.items()}


def local_part(tensor: Any) -> torch.Tensor:
    """Return what this rank holds of a tensor: its shard under FSDP2 or ZeRO-3, else all of it."""
    return (
        tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)
    )


def num_held(model: nn.Module) -> int:
    """Count the elements of a live model's trained parameters that this rank holds."""
    return sum(local_part(p).numel() for p in model.parameters() if p.requires_grad)


def copy_state(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Copy `state` into `tensors` by name; raises JobError if names or shapes differ."""
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
