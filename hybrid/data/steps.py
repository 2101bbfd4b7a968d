"""Loads one process's micro-batches step by step; small ones for several steps at once."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import TensorDataset

from .batches import BLOCK, BatchPlan
from .loader import MicroBatch, load_micro_batch
from .samples import JobSet, find_base, reader_of

AHEAD_BYTES = 2**16  # of inputs and targets that are loaded at once
AHEAD_STEPS = 64
ALIGNMENT = 64  # bytes; torch aligns what it allocates so, and MKL's results can depend on it


@dataclasses.dataclass
class StepLoader:
    """Loads the micro-batches of the shares that a process has.

    size: rows to which a pipeline pads micro-batches, None: there is none. known: targets of each
    sample, where the set tells it. See `load_micro_batch` for the rest. Where samples are rows of
    two tensors, of which a step needs little here, its calls take longer than the copying, so
    several steps are loaded at once and each gets a view. In a pipeline it is one step at least:
    while the first stage loads, the others wait."""

    plan: BatchPlan
    samples: Sequence[Any]
    shares: Sequence[int]
    size: int | None = None
    inputs: bool = True
    targets: bool = True
    known: int | None = None

    def __post_init__(self) -> None:
        self._ahead: dict[int, list[MicroBatch]] = {}
        self._steps = self._steps_at_once()
        self._known_ids: dict[int, list[torch.Tensor]] = {}
        self._planned = max(1, min(AHEAD_STEPS, BLOCK // self._batch()))  # steps at once

    def step(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of one step, share after share."""
        if not self._steps:
            return self.step_alone(step)
        if step not in self._ahead:
            self._ahead = self._load_ahead(step)
        return self._ahead.pop(step)

    def step_alone(self, step: int) -> list[MicroBatch]:
        """Return the same, and load no other step with it."""
        epoch = self.plan.epoch(step)
        return [self._load(ids, epoch, self.size) for ids in self._ids(step)]

    def close(self) -> None:
        """Do nothing; a loader with workers ends them."""

    def _ids(self, step: int) -> list[torch.Tensor]:
        """Return the ids of a step's micro-batches, which are made for several steps at once."""
        if step not in self._known_ids:
            steps = range(step, step + self._planned)
            self._known_ids = {planned: self._plan_ids(planned) for planned in steps}
        return self._known_ids.pop(step)

    def _plan_ids(self, step: int) -> list[torch.Tensor]:
        arrays = (self.plan.micro_batch_arrays(step, share) for share in self.shares)
        return [torch.from_numpy(ids.copy()) for of_share in arrays for ids in of_share]

    def _ids_ahead(self, step: int) -> dict[int, list[torch.Tensor]]:
        """Return the ids of the steps that are loaded at once, up to the first that is padded."""
        found = {}
        for ahead in range(step, step + self._steps):
            every = self._ids(ahead)
            if self.size is not None and any(ids.shape[0] != self.size for ids in every):
                break
            found[ahead] = every
        return found

    def _load(self, ids: torch.Tensor, epoch: int, size: int | None) -> MicroBatch:
        return load_micro_batch(
            self.samples,
            ids,
            size,
            inputs=self.inputs,
            targets=self.targets,
            targets_per_sample=self.known,
            epoch=epoch,
        )

    def _steps_at_once(self) -> int:
        """Return how many steps fit; 0: none, the set is of another kind, or one has one piece."""
        base, _ = find_base(self.samples, [])
        if isinstance(self.samples, JobSet) or reader_of(base) is not TensorDataset:
            return 0
        parts = base.tensors
        if not all(type(t) is torch.Tensor and t.device.type == "cpu" and t.dim() for t in parts):
            return 0
        loaded = itertools.compress(parts, (self.inputs, self.targets))
        row = sum(t[:1].numel() * t.element_size() for t in loaded)
        least = 0 if self.size is None else 1
        steps = max(least, min(AHEAD_STEPS, AHEAD_BYTES // max(1, row * self._batch())))
        return 0 if steps * len(self.shares) * self.plan.micro_batches == 1 else steps

    def _batch(self) -> int:
        """Return how many samples a step has here at most."""
        return -(-self.plan.global_batch // self.plan.shares) * len(self.shares)

    def _load_ahead(self, step: int) -> dict[int, list[MicroBatch]]:
        """Load some steps as views of one large micro-batch.

        From the first time on that a micro-batch of them is empty, or that its rows would not begin
        where torch begins what it allocates, each is loaded alone. So is a step that is padded."""
        steps = self._ids_ahead(step)
        if not steps:
            return {step: self.step_alone(step)}
        ids = [piece for every in steps.values() for piece in every]
        sizes = [piece.shape[0] for piece in ids]
        whole = self._load(torch.cat(ids), 0, None)
        if 0 in sizes or not (_is_aligned(whole.input, sizes) and _is_aligned(whole.target, sizes)):
            self._steps = 0
            return {step: self.step_alone(step)}
        pieces = zip(
            _split(whole.input, sizes),
            _split(whole.target, sizes),
            ids,
            [None if self.known is None else self.known * size for size in sizes],
            strict=True,
        )
        return {s: [MicroBatch(*next(pieces)) for _ in every] for s, every in steps.items()}


def _is_aligned(tensor: torch.Tensor | None, sizes: Sequence[int]) -> bool:
    """Tell whether pieces of so many rows begin at aligned addresses; only floats need to."""
    if tensor is None or not tensor.is_floating_point():
        return True
    row = tensor[:1].numel() * tensor.element_size()
    return all(size * row % ALIGNMENT == 0 for size in sizes[:-1])


def _split(tensor: torch.Tensor | None, sizes: list[int]) -> Sequence[torch.Tensor | None]:
    """Cut a tensor into pieces that a layer may change in place, as if each were loaded alone.

    torch forbids that of views that one call made, and takes a change of one for one of all: `data`
    knows of no other view."""
    if tensor is None:
        return [None] * len(sizes)
    return [piece.data for piece in tensor.split_with_sizes(sizes)]
