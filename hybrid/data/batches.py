"""Which samples each rank sees at each step, a pure function of (seed, step, rank); their tensors.

Each epoch is a fresh permutation, cut into global batches (the last may be smaller), a batch into
shares of the data-parallel ranks, a share into micro-batches; sizes differ by at most one sample.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..layout import split


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The order of one run's samples.

    num_samples in the set; global_batch: samples an optimizer step; shares: data-parallel ranks;
    micro_batches: pieces of a share; seed None keeps the set's own order (evaluation).
    """

    num_samples: int
    global_batch: int
    shares: int
    micro_batches: int
    seed: int | None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch)

    def batch(self, step: int) -> list[int]:
        """Sample ids of the global batch of `step` (optimizer steps from 0)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.global_batch
        stop = min(start + self.global_batch, self.num_samples)
        if self.seed is None:
            return list(range(start, stop))
        return self._order(epoch, self.seed)[start:stop].tolist()

    def micro_batch_ids(self, step: int, share: int) -> list[list[int]]:
        """Sample ids of each micro-batch of one data-parallel rank; some may be empty."""
        return split(split(self.batch(step), self.shares)[share], self.micro_batches)

    def _order(self, epoch: int, seed: int) -> torch.Tensor:
        if _last_order.get("key") != (self.num_samples, seed, epoch):
            draw = torch.Generator().manual_seed(_mix(seed, epoch))
            order = torch.randperm(self.num_samples, generator=draw)
            _last_order.update(key=(self.num_samples, seed, epoch), order=order)
        return _last_order["order"]


_last_order: dict[str, Any] = {}  # one epoch's permutation: asked for at every step of the epoch


def _mix(seed: int, epoch: int) -> int:
    """A seed of its own for each epoch; the odd constant keeps (s, e+1) off (s+1, e). torch's CPU
    generator reads the low 32 bits alone, so the seed's high ones are folded into them."""
    return (seed * 0x9E3779B97F4A7C15 + (seed >> 32) * 0xD1B54A32D192ED03 + epoch) % 2**63
