"""This module holds what all engines do alike, in the base class that they inherit from."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..data.loader import MicroBatch
from ..job.schema import Job
from ..launch.exchange import gather_rows
from ..launch.placement import Placement
from ..models.losses import Loss
from ..records import EvalResult, Receipt
from .layers import sample_seeds
from .optimizer import LossScale, clip, global_norm
from .precision import Observer, Stepped, check_ledger, make_ledger
from .protocol import Engine, StepResult, extend_receipt
from .state import gradient_dtypes, on_device
from .tally import StepRow, Tally, count_targets, eval_result, num_rows, step_result


class BaseEngine(Engine):
    """Holds the state that every engine has, and the parts of a step that are the same for all.
    A subclass sets the attributes below, and adds the methods of `Engine`, documented there."""

    micro_batch_size: int | None = None
    model: Any  # the live one; of several replicas, the first
    num_held: int
    observer: Observer
    buffers: str  # the dtypes of the model's buffers before an engine took it

    def __init__(self, job: Job, placement: Placement, loss: Loss) -> None:
        self.job, self.placement, self.loss = job, placement, loss
        self.layout, self.device = placement.layout, placement.device
        self.shares: tuple[int, ...] = (placement.dp_rank,)
        self.step = 0  # optimizer steps done
        self.digests: tuple[str, ...] = ()  # each rank's samples in the first step
        self.gradients = ""  # the dtypes of the gradients in the first step

    def _count_targets(self, micro_batches: Iterable[MicroBatch]) -> int:
        """Count the targets in the micro-batches of all ranks; collective."""
        mine = sum(count_targets(self.loss, micro_batch) for micro_batch in micro_batches)
        return sum(row[0] for row in gather_rows([mine]))

    def _forward(
        self, model: Any, micro_batch: MicroBatch, place: Sequence[int], tally: Tally
    ) -> torch.Tensor:
        """Return the summed loss of one training micro-batch; `place`: see `sample_seeds`."""
        micro_batch = on_device(micro_batch, self.device)
        rows = num_rows(micro_batch.target)
        with sample_seeds(self.job, self.step, place, micro_batch.ids, rows):
            return tally.add(self.loss, model(micro_batch.input), micro_batch)

    def _clip_gradients(self, model: nn.Module, norm: float) -> None:
        """Clip reduced gradients whose global norm is `norm`, as the job says."""
        self.gradients = self.gradients or gradient_dtypes(model)
        clip(model.parameters(), norm, self.job.train.clip_norm)

    def _clip_and_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scale: LossScale
    ) -> float:
        """Make one optimizer step, and return the gradients' global norm before clipping.
        It is not finite where an fp16 gradient overflowed."""
        scale.unscale(optimizer)
        norm = global_norm(model.parameters())
        self._clip_gradients(model, norm)
        scale.step(optimizer)
        optimizer.zero_grad()
        return norm

    def _finish_step(
        self, rows: Sequence[StepRow], expected: int | None, loss_scale: float
    ) -> StepResult:
        """Return the result of a step from all ranks' rows; raises what `step_result` raises.
        `loss_scale` was in force in the step; only fp16 has one."""
        self.step += 1
        self.observer.stop()
        fp16 = self.job.train.precision == "fp16"
        result = step_result(rows, expected, loss_scale if fp16 else None)
        self.digests = self.digests or result.digest_by_rank
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        tally = Tally(self.device)
        self.model.eval()
        for micro_batch in itertools.chain.from_iterable(batches):
            micro_batch = on_device(micro_batch, self.device)
            tally.add(self.loss, self.model(micro_batch.input), micro_batch, score=True)
        return eval_result(tally.row())

    def _add_ledger(self, receipt: Receipt, stepped: Stepped) -> Receipt:
        """Return the receipt with this rank's precision ledger, which must meet its conditions."""
        ledger = make_ledger(self.observer, self.model, stepped)
        conditions = check_ledger(self.job.train.precision, self.buffers, ledger)
        return extend_receipt(receipt, {"precision": ledger}, conditions)
