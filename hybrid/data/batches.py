"""This module decides which samples each rank sees at each step, from (seed, step, rank) alone.

Each epoch is a new permutation of the samples. It is cut into global batches (the last may be
smaller), a batch into the shares of the data-parallel ranks, and a share into micro-batches. Sizes
differ by at most one sample."""

import dataclasses
import functools

import numpy

from ..layout import make_ranges, split_sizes
from .permutation import permute

BLOCK = 4096  # positions computed at once: one costs 0.04 us then, and a call for few 60 us


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

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """The optimizer steps of an epoch, with the one whose batch may be smaller."""
        return -(-self.num_samples // self.global_batch)

    def epoch(self, step: int) -> int:
        """Returns the epoch that the batch of `step` belongs to."""
        return step // self.steps_per_epoch

    def batch_size(self, step: int) -> int:
        """Returns how many samples the global batch of `step` has."""
        start = step % self.steps_per_epoch * self.global_batch
        return min(self.global_batch, self.num_samples - start)

    def totals(self, step: int, targets_each: int | None) -> tuple[int | None, int]:
        """Returns how many targets and samples the global batch of `step` has.
        targets_each: of each sample, None where the set does not tell it; nor are targets then."""
        samples = self.batch_size(step)
        return None if targets_each is None else targets_each * samples, samples

    def batch(self, step: int) -> list[int]:
        """Returns the sample ids of the global batch of `step` (optimizer steps from 0)."""
        ids: list[int] = self._ids(*self._place(step)).tolist()
        return ids

    def micro_batch_ids(self, step: int, share: int) -> list[list[int]]:
        """Returns the sample ids of each micro-batch of a data-parallel rank; some may be empty."""
        return [ids.tolist() for ids in self.micro_batch_arrays(step, share)]

    def micro_batch_arrays(self, step: int, share: int) -> list[numpy.ndarray]:
        """Returns the same as arrays, int64 [n], which are parts of one that is kept."""
        epoch, positions = self._place(step)
        mine = _runs(len(positions), self.shares)[share]
        ids = self._ids(epoch, positions[mine.start : mine.stop])
        return [ids[run.start : run.stop] for run in _runs(len(ids), self.micro_batches)]

    def _place(self, step: int) -> tuple[int, range]:
        """Returns the epoch of `step`, and the positions of its global batch in that epoch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.global_batch
        return epoch, range(start, min(start + self.global_batch, self.num_samples))

    def _ids(self, epoch: int, positions: range) -> numpy.ndarray:
        """Returns the sample ids at positions of one global batch, or of a part of it."""
        if self.seed is None or not positions:
            return numpy.arange(positions.start, positions.stop)
        order = self.num_samples, self.seed, epoch
        if self.global_batch >= BLOCK:
            return permute(positions, *order).view(numpy.int64)
        size = BLOCK // self.global_batch * self.global_batch  # so that no batch is in two blocks
        first = positions.start // size * size
        block = _block(range(first, min(first + size, self.num_samples)), *order)
        return block[positions.start - first : positions.stop - first]


@functools.lru_cache(maxsize=2)  # a run's steps ask for the same block many times in a row
def _block(positions: range, num_samples: int, seed: int, epoch: int) -> numpy.ndarray:
    """Returns a part of an epoch's order, and keeps the last ones."""
    return permute(positions, num_samples, seed, epoch).view(numpy.int64)


@functools.lru_cache(maxsize=8)  # a plan has two sizes of batches, and as many of shares
def _runs(total: int, parts: int) -> tuple[range, ...]:
    """Returns the runs that `layout.split` cuts `total` items into."""
    return tuple(make_ranges(split_sizes(total, parts)))
