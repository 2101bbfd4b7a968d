"""This module keeps one set of the buffers that a model's forward pass changes.

These are running statistics of batch norm, for example. The rule is the same under every strategy
that shares a batch among data-parallel ranks: in each step all ranks begin with the same buffers,
and after it those of the first rank are everybody's. DDP does so by itself, since it sends rank 0's
buffers before a forward pass. So a recorded evaluation is that of the saved weights.

Local SGD averages buffers with its parameters instead."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..launch.exchange import gather_objects

Versions = Mapping[str, tuple[int, int]]


def copy_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy all buffers of a model, by name."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def put_buffers(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Give a model's buffers the values that `copy_buffers` took."""
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def restore_buffers(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Do so for those buffers alone that have changed: the others keep their versions."""
    for name, buffer in model.named_buffers():
        if name in buffers and not same_values(buffers[name], buffer):
            buffer.copy_(buffers[name])


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are equal, where NaN is equal to NaN."""
    if torch.equal(one, other):
        return True
    if one.shape != other.shape or not one.is_floating_point():
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def moved_buffers(model: nn.Module, before: Mapping[str, torch.Tensor]) -> list[str]:
    """Name the buffers whose values are not those that `copy_buffers` took."""
    return [n for n, b in model.named_buffers() if n not in before or not same_values(before[n], b)]


def _versions(model: nn.Module) -> Versions:
    return {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()}


class OneSet:
    """Makes the buffers of a group's first rank those of all its ranks, where any moves.

    Those that move are known after the first step, by their values: batch norm changes its running
    statistics without a new version of the tensor. Those that begin later are found by versions,
    its counter's for batch norm, before an evaluation and before weights are gathered.

    group: of the ranks whose batches are shares of one; None: all. first: its first rank."""

    def __init__(self, model: nn.Module, group: Any = None, first: int = 0) -> None:
        self.model, self.group, self.first = model, group, first
        self.before: dict[str, torch.Tensor] | None = copy_buffers(model)
        self.versions: Versions = {}
        self.moving: set[str] = set()

    def after_step(self) -> None:
        """Take over the first rank's buffers; collective."""
        if self.before is not None:
            self._add(moved_buffers(self.model, self.before))
            self.before = None
            self.versions = _versions(self.model)
        self._send()

    def before_use(self) -> None:
        """Do so for the buffers that have begun to move since the first step; collective."""
        if self.before is not None:
            return  # no step was made
        now = _versions(self.model)
        owners = {n.rpartition(".")[0] for n, v in now.items() if self.versions.get(n) != v}
        late = [n for n in now if n.rpartition(".")[0] in owners and n not in self.moving]
        self.versions = now
        if self._add(late):
            self._send()

    def _add(self, found: Iterable[str]) -> bool:
        """Note buffers that any rank found to move; tell whether any is new."""
        known = len(self.moving)
        self.moving |= {name for names in gather_objects(list(found)) for name in names}
        return len(self.moving) > known

    def _send(self) -> None:
        if not self.moving:
            return
        named = self.model.named_buffers()
        moving = [buffer for name, buffer in named if name in self.moving]
        send_buffers(moving, self.first, self.group)


@torch.no_grad()
def send_buffers(buffers: Iterable[torch.Tensor], first: int = 0, group: Any = None) -> None:
    """Make the rank `first`'s buffers those of all ranks in the group; collective."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for buffer in buffers:
        if buffer.numel():
            kinds.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    for alike in kinds.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in alike])
        dist.broadcast(flat, first, group=group)
        pieces = flat.split([buffer.numel() for buffer in alike])
        for buffer, piece in zip(alike, pieces, strict=True):
            buffer.copy_(piece.view_as(buffer))


class SharesInTurn:
    """Plays, in one process, the buffers of ranks that have a share of each batch.

    Every share of a step begins with the buffers that the step began with; the first's are kept."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.start = model, copy_buffers(model)
        self.kept: dict[str, torch.Tensor] | None = None

    def end_share(self) -> None:
        """Put the buffers back to what they were at the step's begin."""
        self.kept = self.kept or copy_buffers(self.model)
        put_buffers(self.model, self.start)

    def end_step(self) -> None:
        """Keep what the first share made of them."""
        if self.kept is not None:
            put_buffers(self.model, self.kept)
