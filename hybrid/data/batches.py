"""This module decides which samples each rank sees at each step, from (seed, step, rank) alone.

Each epoch is a new permutation of the samples. It is cut into global batches (the last may be
smaller), a batch into the shares of the data-parallel ranks, and a share into micro-batches. Sizes
differ by at most one sample."""

import dataclasses

import torch

from ..layout import split


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Fixes the order of one run's samples.

    num_samples: size of the set. global_batch: samples of an optimizer step. shares: data-parallel
    ranks. micro_batches: pieces of a share. seed: None keeps the set's own order, for evaluation.
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
        """Returns the sample ids of the global batch of `step` (optimizer steps from 0)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.global_batch
        stop = min(start + self.global_batch, self.num_samples)
        if self.seed is None:
            return list(range(start, stop))
        return _permutation(self.num_samples, self.seed, epoch)[start:stop].tolist()

    def micro_batch_ids(self, step: int, share: int) -> list[list[int]]:
        """Returns the sample ids of each micro-batch of a data-parallel rank; some may be empty."""
        return split(split(self.batch(step), self.shares)[share], self.micro_batches)


_last_order: dict[tuple[int, int, int], torch.Tensor] = {}  # each step of an epoch asks again


def _permutation(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Returns the permutation of an epoch, which has a seed of its own; the last one is kept.

    The odd constant keeps (seed, epoch + 1) apart from (seed + 1, epoch). torch's CPU generator
    reads only the low 32 bits of a seed, so the job's high ones are folded into them."""
    key = num_samples, seed, epoch
    if key not in _last_order:
        mixed = seed * 0x9E3779B97F4A7C15 + (seed >> 32) * 0xD1B54A32D192ED03 + epoch
        draw = torch.Generator().manual_seed(mixed % 2**63)
        _last_order.clear()
        _last_order[key] = torch.randperm(num_samples, generator=draw)
    return _last_order[key]
