"""The engine behind DDP, FSDP2 and ZeRO: a model and an optimizer that Accelerate has prepared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..config import Job
from ..data.batches import MicroBatch
from ..launchers import Ranks
from ..layout import Layout
from ..models.losses import Loss
from ..processes import device, gather_rows
from ..records import EvalResult, Receipt
from ..schedule import learning_rate
from . import _deepspeed, _model, _optimizer, _precision, _torch
from ._accelerate import Prepared
from .base import StepResult, extend_receipt

State = dict[str, torch.Tensor]


class AccelerateEngine:
    """A model and an optimizer prepared by one `Accelerator`.

    `inspect(engine)` gives the strategy's receipt, `gather(engine)` its full tensors on every rank,
    and `scatter(engine, state)` takes them back: the three things that differ between strategies.
    """

    gradients = ""

    micro_batch_size: int | None = None
    shares: tuple[int, ...]

    def __init__(
        self,
        job: Job,
        layout: Layout,
        loss: Loss,
        accelerator: Any,
        prepared: Prepared,
        inspect: Callable[[AccelerateEngine], Receipt],
        gather: Callable[[AccelerateEngine], State],
        scatter: Callable[[AccelerateEngine, Mapping[str, torch.Tensor]], None],
    ) -> None:
        self.job, self.layout, self.loss = job, layout, loss
        self.accelerator = accelerator
        self.model, self.optimizer, self.observer, self.buffers = prepared
        self.num_held = _torch.num_held(self.model)
        self.inspect, self.gather, self.scatter = inspect, gather, scatter
        self.device = device()
        self.scale = _optimizer.LossScale(job, self.device)
        self.shares = (layout.dp_rank(Ranks.from_env().rank),)
        self.step = 0
        self.digests: tuple[str, ...] = ()

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """See `Engine`."""
        tally = _torch.Tally(self.device)
        mine = sum(_torch.count_targets(self.loss, mb) for mb in micro_batches)
        count = sum(int(row[0]) for row in gather_rows([mine]))
        # Accelerate (or DeepSpeed) divides by the micro-batches, and the reduction averages over
        # ranks; a mean over the global batch's targets wants neither.
        share = len(micro_batches) * self.layout.dp / max(1, count)
        self.model.train()
        _optimizer.set_learning_rate(self.optimizer, learning_rate(self.job, self.step))
        scale, norm = self._loss_scale(), math.nan
        for k, micro_batch in enumerate(micro_batches):
            micro_batch = self._on_device(micro_batch)
            with self.accelerator.accumulate(self.model):
                place, size = (*self.shares, k, 0), _torch.num_rows(micro_batch.target)
                with _model.drawing(self.job, self.step, place, micro_batch.ids, size):
                    output = self.model(micro_batch.input)
                    loss_sum = tally.add(self.loss, output, micro_batch)
                self._backward(loss_sum * share)
                if self.accelerator.sync_gradients:
                    norm = self._clip()
                    self._step()
        self.step += 1
        self.observer.stop()
        rate = _optimizer.read_learning_rate(self.optimizer)
        rows = gather_rows([*tally.row(), norm, rate])
        result = _torch.step_result(rows, count, scale)
        self.digests = self.digests or result.digest_by_rank
        return result

    def _loss_scale(self) -> float | None:
        if self.job.train.precision != "fp16":
            return None
        zero = self.zero_optimizer
        return float(zero.loss_scale) if zero is not None else self.scale.value

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's own optimizer, which scales and steps by itself; None without DeepSpeed."""
        live = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        return live.engine.optimizer if live is not None else None

    def _backward(self, loss: torch.Tensor) -> None:
        own = self.zero_optimizer is None
        self.accelerator.backward(self.scale.scale(loss) if own else loss)

    def _clip(self) -> float:
        """Global norm before clipping; not finite where an fp16 gradient overflowed."""
        zero = self.zero_optimizer
        if zero is not None:  # it has clipped and stepped in backward
            norm = self.accelerator.clip_grad_norm_(None, math.inf)
            return math.inf if zero.overflow else float(norm)
        self.scale.unscale(self.optimizer.optimizer)
        norm = _optimizer.global_norm(self.model.parameters())
        _optimizer.clip(self.model.parameters(), norm, self.job.train.clip_norm)
        self.gradients = self.gradients or _torch.gradient_dtypes(self.model)
        return norm

    def _step(self) -> None:
        if self.zero_optimizer is None:
            self.scale.step(self.optimizer.optimizer)
            self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        """See `Engine`."""
        tally = _torch.Tally(self.device)
        self.model.eval()
        for micro_batches in batches:
            for micro_batch in micro_batches:
                micro_batch = self._on_device(micro_batch)
                tally.add(self.loss, self.model(micro_batch.input), micro_batch, score=True)
        return _torch.eval_result(tally.row())

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
        ledger = _precision.ledger(self.observer, self.model, self._stepped())
        conditions = _precision.check_ledger(self.job.train.precision, self.buffers, ledger)
        return extend_receipt(receipt, {"precision": ledger}, conditions)

    def _stepped(self) -> _precision.Stepped:
        if self.zero_optimizer is None:
            return _precision.Stepped.plain(self.optimizer.optimizer, self.gradients)
        return _deepspeed.stepped(self.zero_optimizer)

    def close(self) -> None:
        """See `Engine`."""
        self.accelerator.free_memory()
        self.model = self.optimizer = None  # type: ignore[assignment]

    def _on_device(self, micro_batch: MicroBatch) -> MicroBatch:
        inputs = _torch.to_device(micro_batch.input, self.device)
        target = _torch.to_device(micro_batch.target, self.device)
        return MicroBatch(inputs, target, micro_batch.ids)
