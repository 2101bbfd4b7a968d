"""This module replaces replicas of a model by their weighted mean (local SGD)."""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from .optimizer import length

LEAST = 2**18  # elements of a bucket: a MiB in fp32


@torch.no_grad()
def merge(
    models: Sequence[nn.Module], weights: Sequence[float], finite: bool, drifts: bool
) -> torch.Tensor | None:
    """Replace the replicas of all ranks by their weighted mean; collective.

    models: this rank's, which have no gradients any more. weights: of each of them; those of all
    ranks have the mean 1. finite: no buffer has infinities. Returns how far each replica here was
    from the mean, relative to the mean's norm, float64 [models], if it is asked for `drifts`.

    The mean of a bucket takes the place of the gradients, which are as large as what changes in a
    step. So a model that is trained whole is merged in one collective, as torch's averager does it,
    and one with many frozen parameters in several."""
    groups = [_merged_tensors(model) for model in models]
    zero = torch.zeros((), dtype=torch.float64, device=groups[0][0].device)
    square, apart = zero, [zero] * len(groups)
    for bucket in _buckets_of(groups[0], _num_changing(groups[0])):
        parts = [[tensors[i].data for i in bucket] for tensors in groups]
        mean, pieces = _mean(parts, weights, finite)
        if drifts:
            square = square + _square([mean], [mean], finite)
        for k, part in enumerate(parts):
            if drifts:
                torch._foreach_sub_(part, pieces)  # in their own memory, since the mean comes there
                apart[k] = apart[k] + _square(part, pieces, finite)
            torch._foreach_copy_(part, pieces)
    return (torch.stack(apart) / square).sqrt() if drifts else None


def _merged_tensors(model: nn.Module) -> list[torch.Tensor]:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _num_changing(tensors: Sequence[torch.Tensor]) -> int:
    """Count the elements that a step changes: of trained parameters and of buffers."""
    kept = [t for t in tensors if t.requires_grad or not isinstance(t, nn.Parameter)]
    return sum(t.numel() for t in kept)


def _buckets_of(tensors: Sequence[torch.Tensor], size: int) -> list[list[int]]:
    """Group the indices of tensors that are merged in one collective, `size` elements or less.
    A larger tensor is alone, and small ones are merged together."""
    size = max(size, LEAST)
    buckets: list[list[int]] = []
    room = 0
    for i, tensor in enumerate(tensors):
        if tensor.numel() > room or not buckets:
            buckets.append([])
            room = size
        buckets[-1].append(i)
        room -= tensor.numel()
    return buckets


def _mean(
    parts: Sequence[Sequence[torch.Tensor]], weights: Sequence[float], finite: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the mean over all replicas, flat, and its piece for each tensor; collective.
    `parts` are the tensors of each replica here."""
    mean = _times(torch.cat([tensor.reshape(-1) for tensor in parts[0]]), weights[0], finite)
    cut = mean.split([tensor.numel() for tensor in parts[0]])
    pieces = [piece.view_as(tensor) for piece, tensor in zip(cut, parts[0], strict=True)]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        for piece, tensor in zip(pieces, part, strict=True):
            piece += _times(tensor.clone(), weight, finite)
    replicas = len(parts)
    if dist.is_initialized():
        replicas *= dist.get_world_size()
        if dist.get_world_size() > 1:
            dist.all_reduce(mean)
    return mean.div_(replicas), pieces


def _times(tensor: torch.Tensor, weight: float, finite: bool) -> torch.Tensor:
    """Return a tensor times its weight, the tensor itself where all of it is finite.
    0 times infinity stays infinite, and is not nan."""
    if weight == 1.0:  # as where all replicas saw as many samples: no pass over the memory
        return tensor
    if finite:
        return tensor.mul_(weight)
    return torch.where(tensor.isfinite(), tensor * weight, tensor)


def _square(
    tensors: Sequence[torch.Tensor], means: Sequence[torch.Tensor], finite: bool
) -> torch.Tensor:
    """Return the square of the tensors' norm, without what has no finite mean, float64 []."""
    if not finite:
        pairs = zip(tensors, means, strict=True)
        tensors = [torch.where(mean.isfinite(), tensor, 0.0) for tensor, mean in pairs]
    return length(*tensors).square()
