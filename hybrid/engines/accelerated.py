"""This module holds the engine behind DDP and FSDP2: a model that Accelerate has prepared."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..data.loader import MicroBatch
from ..job.schema import Job
from ..launch.blocking_calls import reducing
from ..launch.placement import Placement
from ..models.losses import Loss
from ..records import Receipt
from .accelerator import PreparedModel
from .base import BaseEngine
from .buffers import OneSet, send_buffers
from .comm_hooks import put_hook, read_hook
from .constant_buffers import ConstantBuffers
from .optimizer import LossScale, read_learning_rate, set_learning_rate, shard_groups
from .precision import Stepped
from .protocol import OwnState
from .schedule import learning_rate
from .state import named_tensors, num_held
from .step_queue import LocalRow
from .tally import Tally
from .training_state import as_stepper

State = dict[str, torch.Tensor]


class AcceleratedEngine(BaseEngine):
    """Trains a model that one `Accelerator` prepared, with torch's optimizer.

    Two functions hold what differs between strategies: `inspect(engine)` gives the receipt, and
    `scatter(engine, state)` takes full tensors over."""

    def __init__(
        self,
        job: Job,
        placement: Placement,
        loss: Loss,
        prepared: PreparedModel,
        inspect: Callable[[Any], Receipt],
        scatter: Callable[[Any, Mapping[str, torch.Tensor]], None],
    ) -> None:
        super().__init__(job, placement, loss)
        self.accelerator, self.model, self.optimizer, self.observer, self.buffers = prepared[:5]
        self.units = prepared.units
        self.inspect, self.scatter = inspect, scatter
        self.num_held = num_held(self.model)
        self.scale = LossScale(job, self.device, averaged_over=self.layout.dp)
        self._reduces = True  # FSDP2 reduces gradients in the coming backward pass
        self.syncs_each_batch = job.strategy.fsdp.sync_each_batch  # FSDP2 alone reads it
        self.constant: ConstantBuffers | None = None
        self.wrapped = isinstance(self.model, DistributedDataParallel)
        if self.wrapped and job.strategy.ddp.broadcast_buffers == "changing":
            self.constant = ConstantBuffers(self.model)
        if not self.wrapped and self.layout.dp > 1 and any(True for _ in self.model.buffers()):
            self.one_set = OneSet(self.model)
        self.shard_groups = shard_groups(self.model.parameters())
        if self.shard_groups:
            size = self.layout.shard
            firsts = range(0, self.layout.world_size, size)
            self.norm_parts = [list(range(first, first + size)) for first in firsts]

    def _step(self, micro_batches: Sequence[MicroBatch], own: int | float) -> None:
        tally = Tally(self.device)
        self._set_training(self.model)
        set_learning_rate(self.optimizer, learning_rate(self.job, self.step))
        scale = self._loss_scale()
        self.tallies = [tally]
        self._accumulate(micro_batches, tally)
        norm = self._update()
        row = LocalRow(tally, own, norm, read_learning_rate(self.optimizer))
        self._note_step([row], scale, whole=self._norm_is_whole())
        if self.guard and self.guard.fault:
            return  # the buffers are those from before the step
        if self.constant:
            self.constant.after_step(self.step)
        if self.one_set:
            self.one_set.after_step()

    def _accumulate(self, micro_batches: Sequence[MicroBatch], tally: Tally) -> None:
        """Add up the gradients of the micro-batches, and reduce them over the ranks."""
        for k, micro_batch in enumerate(micro_batches):
            due = k == len(micro_batches) - 1
            with self._reduction(due):
                loss_sum = self._forward(self.model, micro_batch, (*self.shares, k, 0), tally)
                with reducing(loss_sum) if due and self.wrapped else contextlib.nullcontext():
                    self._backward(loss_sum, len(micro_batches))

    def _reduction(self, due: bool) -> contextlib.AbstractContextManager[None]:
        """Reduce gradients over the ranks after the last micro-batch alone, as `accumulate` does.

        Until then each rank holds whole gradients. FSDP2 can keep its part of each micro-batch's
        instead: Accelerate calls that `sync_each_batch`.

        Accelerate's own context and `backward` took 0.5 ms of CPU in each micro-batch."""
        if self.wrapped:
            return contextlib.nullcontext() if due else self.model.no_sync()
        due = due or self.syncs_each_batch
        if due != self._reduces:
            self.model.set_requires_gradient_sync(due)
            self._reduces = due
        return contextlib.nullcontext()

    def _loss_scale(self) -> float:
        """Return the loss scale of the coming step."""
        return self.scale.value

    def _backward(self, loss_sum: torch.Tensor, micro_batches: int) -> None:
        """Add the gradients of the mean loss over all ranks' targets."""
        # The reduction averages over ranks: the factor, or under fp16 `unscale`, undoes that.
        self.backward(loss_sum, self.scale.loss_factor / (self._count_all() or 1), self.scale)

    def _update(self) -> torch.Tensor | float:
        """Clip, step, and return what `_clip_gradients` does."""
        return self._clip_and_step(self.optimizer.optimizer, self.scale, self.shard_groups)

    def _norm_is_whole(self) -> bool:
        """Tell whether a rank knows the whole gradient norm of this step, not its shard's part."""
        return bool(self.job.train.clip_norm) or not self.norm_parts

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.scatter(self, state)

    def _tensors(self) -> State:
        if self.one_set:
            self.one_set.before_use()
        if self.wrapped and self.model.broadcast_buffers:
            send_buffers(self.model.module.buffers())  # as its next forward pass will do
        reshard(self.model)
        return named_tensors(getattr(self.model, "module", self.model))

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer
        return optimizer

    def stepper(self) -> torch.optim.Optimizer | None:
        return as_stepper(self.job, self._optimizer())

    def loss_scale_state(self) -> dict[str, float] | None:
        return self.scale.read_state()

    def begin_at(
        self, step: int, loss_scale: Mapping[str, float] | None, own: OwnState | None
    ) -> None:
        super().begin_at(step, loss_scale, own)
        self.scale.set_state(loss_scale)
        if self.one_set:
            self.one_set = OneSet(self.model)
        if self.constant:
            self.constant = ConstantBuffers(self.model)
        if self.wrapped and (note := put_hook(self.model, self._hook_settings(), own)):
            self.notes.append(note)

    def own_state(self) -> OwnState:
        return read_hook(self.model, self._hook_settings())

    def _hook_settings(self) -> dict[str, Any]:
        settings = self.job.strategy.ddp
        return {"rank": settings.powersgd_rank, "bucket_cap_mb": settings.bucket_cap_mb}

    def rehearse(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Take one backward pass, after which DDP orders its buckets."""
        if self.wrapped and micro_batches:
            self._set_training(self.model)
            loss_sum = self._forward(
                self.model, micro_batches[0], (*self.shares, 0, 0), Tally(self.device)
            )
            loss_sum.backward()
            self.model.zero_grad()

    def receipt(self) -> Receipt:
        return self._add_ledger(self.inspect(self), self._stepped())

    def _stepped(self) -> Stepped:
        """Return what the optimizer updates, for the ledger."""
        return Stepped.plain(self.optimizer.optimizer, self.gradients)

    def close(self) -> None:
        # Not `free_memory`, which has Python look through all its objects for garbage (0.2 s).
        self.accelerator = self.model = self.optimizer = self.constant = self.one_set = None
        self.units = ()


def reshard(model: Any) -> None:
    """Free gathered parameters: evaluation leaves those of FSDP2's root gathered, and rounded."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
