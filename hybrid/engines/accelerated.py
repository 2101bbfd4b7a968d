"""The engine behind DDP and FSDP2: a model and an optimizer that Accelerate has prepared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..data.loader import MicroBatch
from ..job.schema import Job
from ..launch.exchange import gather_rows
from ..launch.placement import Placement
from ..models.losses import Loss
from ..records import EvalResult, Receipt
from .accelerator import PreparedModel
from .layers import sample_seeds
from .optimizer import LossScale, clip, global_norm, read_learning_rate, set_learning_rate
from .precision import Stepped, check_ledger, make_ledger
from .protocol import StepResult, extend_receipt
from .schedule import learning_rate
from .state import gradient_dtypes, num_held, on_device
from .tally import Tally, count_targets, eval_result, num_rows, step_result

State = dict[str, torch.Tensor]


class AcceleratedEngine:
    """A model and an optimizer prepared by one `Accelerator`, stepped by torch's optimizer.

    `inspect(engine)` gives the strategy's receipt, `gather(engine)` its full tensors on every rank,
    and `scatter(engine, state)` takes them back: the three things that differ between strategies.
    """

    gradients = ""
    micro_batch_size: int | None = None
    shares: tuple[int, ...]

    def __init__(
        self,
        job: Job,
        placement: Placement,
        loss: Loss,
        accelerator: Any,
        prepared: PreparedModel,
        inspect: Callable[[Any], Receipt],
        gather: Callable[[Any], State],
        scatter: Callable[[Any, Mapping[str, torch.Tensor]], None],
    ) -> None:
        self.job, self.layout, self.loss = job, placement.layout, loss
        self.accelerator = accelerator
        self.model, self.optimizer, self.observer, self.buffers = prepared
        self.num_held = num_held(self.model)
        self.inspect, self.gather, self.scatter = inspect, gather, scatter
        self.device = placement.device
        self.scale = LossScale(job, self.device)
        self.shares = (placement.dp_rank,)
        self.step = 0
        self.digests: tuple[str, ...] = ()

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """See `Engine`."""
        tally = Tally(self.device)
        mine = sum(count_targets(self.loss, mb) for mb in micro_batches)
        count = sum(row[0] for row in gather_rows([mine]))
        # Accelerate (or DeepSpeed) divides by the micro-batches, and the reduction averages over
        # ranks; a mean over the global batch's targets wants neither.
        share = len(micro_batches) * self.layout.dp / max(1, count)
        self.model.train()
        set_learning_rate(self.optimizer, learning_rate(self.job, self.step))
        scale, norm = self._loss_scale(), math.nan
        for k, micro_batch in enumerate(micro_batches):
            micro_batch = on_device(micro_batch, self.device)
            with self.accelerator.accumulate(self.model):
                place, size = (*self.shares, k, 0), num_rows(micro_batch.target)
                with sample_seeds(self.job, self.step, place, micro_batch.ids, size):
                    output = self.model(micro_batch.input)
                    loss_sum = tally.add(self.loss, output, micro_batch)
                self._backward(loss_sum * share)
                if self.accelerator.sync_gradients:
                    norm = self._update()
        self.step += 1
        self.observer.stop()
        rows = gather_rows(tally.step_row(norm, read_learning_rate(self.optimizer)))
        result = step_result(rows, count, scale)
        self.digests = self.digests or result.digest_by_rank
        return result

    def _loss_scale(self) -> float | None:
        """fp16's loss scale of the step that comes; None in other precisions."""
        return self.scale.value if self.job.train.precision == "fp16" else None

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(self.scale.scale(loss))

    def _update(self) -> float:
        """Clip and step; returns the global norm before clipping, which is not finite where an fp16
        gradient overflowed."""
        self.scale.unscale(self.optimizer.optimizer)
        norm = global_norm(self.model.parameters())
        clip(self.model.parameters(), norm, self.job.train.clip_norm)
        self.gradients = self.gradients or gradient_dtypes(self.model)
        self.scale.step(self.optimizer.optimizer)
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        """See `Engine`."""
        tally = Tally(self.device)
        self.model.eval()
        for micro_batches in batches:
            for micro_batch in micro_batches:
                micro_batch = on_device(micro_batch, self.device)
                tally.add(self.loss, self.model(micro_batch.input), micro_batch, score=True)
        return eval_result(tally.row())

    def state(self) -> State:
        """See `Engine`."""
        full = self.gather(self)
        return full if self.accelerator.is_main_process else {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Engine`."""
        self.scatter(self, state)

    def receipt(self) -> Receipt:
        """See `Engine`."""
        receipt = self.inspect(self)
        ledger = make_ledger(self.observer, self.model, self._stepped())
        conditions = check_ledger(self.job.train.precision, self.buffers, ledger)
        return extend_receipt(receipt, {"precision": ledger}, conditions)

    def _stepped(self) -> Stepped:
        """What the optimizer updates, for the ledger."""
        return Stepped.plain(self.optimizer.optimizer, self.gradients)

    def close(self) -> None:
        """See `Engine`."""
        self.accelerator.free_memory()
        self.model = self.optimizer = None  # type: ignore[assignment]
