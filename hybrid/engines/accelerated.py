"""This module holds the engine behind DDP and FSDP2: a model that Accelerate has prepared."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..data.loader import MicroBatch
from ..job.schema import Job
from ..launch.exchange import gather_rows
from ..launch.placement import Placement
from ..models.losses import Loss
from ..records import Receipt
from .accelerator import PreparedModel
from .base import BaseEngine
from .optimizer import LossScale, read_learning_rate, set_learning_rate
from .precision import Stepped
from .protocol import StepResult
from .schedule import learning_rate
from .state import num_held
from .tally import Tally

State = dict[str, torch.Tensor]


class AcceleratedEngine(BaseEngine):
    """Trains a model that one `Accelerator` prepared, with torch's optimizer.

    Three functions hold what differs between strategies: `inspect(engine)` gives the receipt,
    `gather(engine)` the full tensors (collective; only rank 0's are used), and
    `scatter(engine, state)` takes them back."""

    def __init__(
        self,
        job: Job,
        placement: Placement,
        loss: Loss,
        prepared: PreparedModel,
        inspect: Callable[[Any], Receipt],
        gather: Callable[[Any], State],
        scatter: Callable[[Any, Mapping[str, torch.Tensor]], None],
    ) -> None:
        super().__init__(job, placement, loss)
        self.accelerator, self.model, self.optimizer, self.observer, self.buffers = prepared
        self.inspect, self.gather, self.scatter = inspect, gather, scatter
        self.num_held = num_held(self.model)
        self.scale = LossScale(job, self.device)

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        tally, count = Tally(self.device), self._count_targets(micro_batches)
        # Accelerate (or DeepSpeed) divides by the micro-batches, and the reduction averages over
        # ranks. A mean over the targets of the global batch needs neither.
        share = len(micro_batches) * self.layout.dp / max(1, count)
        self.model.train()
        set_learning_rate(self.optimizer, learning_rate(self.job, self.step))
        scale, norm = self._loss_scale(), math.nan
        for k, micro_batch in enumerate(micro_batches):
            with self.accelerator.accumulate(self.model):
                loss_sum = self._forward(self.model, micro_batch, (*self.shares, k, 0), tally)
                self._backward(loss_sum * share)
                if self.accelerator.sync_gradients:
                    norm = self._update()
        rows = gather_rows(tally.step_row(norm, read_learning_rate(self.optimizer)))
        return self._finish_step(rows, count, scale)

    def _loss_scale(self) -> float:
        """Return the loss scale of the coming step."""
        return self.scale.value

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(self.scale.scale(loss))

    def _update(self) -> float:
        """Clip, step, and return the global norm before clipping, as `_clip_and_step` does."""
        return self._clip_and_step(self.model, self.optimizer.optimizer, self.scale)

    def state(self) -> State:
        full = self.gather(self)
        return full if self.accelerator.is_main_process else {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.scatter(self, state)

    def receipt(self) -> Receipt:
        return self._add_ledger(self.inspect(self), self._stepped())

    def _stepped(self) -> Stepped:
        """Return what the optimizer updates, for the ledger."""
        return Stepped.plain(self.optimizer.optimizer, self.gradients)

    def close(self) -> None:
        # Not `free_memory`, which has Python look through all its objects for garbage (0.2 s).
        self.accelerator = self.model = self.optimizer = None
