"""This module runs a pipeline by `torch.distributed.pipelining`: it has its engine for `pipeline`.

https://docs.pytorch.org/docs/stable/distributed.pipelining.html"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ..data.loader import MicroBatch
from ..job.schema import Job
from ..launch.placement import Placement
from ..models.layers import Layers
from ..models.losses import Loss
from ..records import EvalResult, Receipt
from .buffers import copy_buffers, restore_buffers
from .guard import is_held
from .optimizer import (
    LossScale,
    build_optimizer,
    finish_step,
    parameters_of,
    read_learning_rate,
    set_learning_rate,
)
from .pipeline_stage import Stage
from .precision import DTYPES, Stepped, round_at_use
from .protocol import OwnState, make_receipt
from .schedule import learning_rate
from .state import num_held
from .step_queue import LocalRow
from .tally import Tally, eval_result
from .training_state import as_stepper

SCHEDULES: dict[str, Callable[..., Any]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class TorchStage(Stage):
    """Trains one stage of a pipeline, by a schedule of torch's.

    torch passes tensors of fixed shapes between stages, and learns these by one forward and one
    backward pass more, before a schedule's first micro-batch."""

    def __init__(
        self, job: Job, placement: Placement, layers: Layers, loss: Loss, name: str
    ) -> None:
        super().__init__(job, placement, layers, loss, name)
        own, no_decay = self._own_module(layers)
        # Under its number, as DeepSpeed names it.
        self.model = nn.Sequential(OrderedDict({str(self.stage): own})).to(self.device)
        self.num_held = num_held(self.model)
        parameters = self.assignment.parameters(own)
        self.optimizer = build_optimizer(job, parameters, no_decay)
        round_at_use(self.model, DTYPES[job.train.precision])
        self.tied = self.assignment.tied()
        self.counted_before = {p for p, _, first in self.tied if not first}  # by another stage
        self.scale = LossScale(job, self.device)
        self.scale.scale(torch.ones((), device=self.device))  # it makes its own tensors by a loss
        self.unlearned = False  # torch asks next for shapes
        self.buffers_before: dict[str, torch.Tensor] = {}  # it asked
        kind = SCHEDULES[job.strategy.pipeline.schedule]
        self.schedule = self._make_schedule(kind, self.micro_batches, lambda loss, _: loss)
        self.numbers = torch.zeros(self.micro_batches)  # of which torch wants one a micro-batch
        self.evaluations: dict[int, Any] = {}  # schedules, by their micro-batches

    def _make_schedule(self, kind: Callable[..., Any], number: int, loss: Any = None) -> Any:
        """Make a schedule of `number` micro-batches, with tensors to receive theirs.

        loss: makes it take gradients too. The last stage gives it what it takes these of."""
        run = _Forward(self._forward_one)
        stage = PipelineStage(run, self.stage, self.layout.pp, self.device)
        return kind(stage, number, loss_fn=loss, scale_grads=False)

    def _run(self, schedule: Any, micro_batches: Sequence[MicroBatch], **options: Any) -> None:
        """Run a schedule over micro-batches, and raise what a stage's module raises as it is.

        torch would raise an error of its own in place of it, with the shapes of all arguments."""
        self._feed(micro_batches)
        self.unlearned = not schedule._stage_forward_initialized
        try:
            schedule.step(return_outputs=False, **options)
        except RuntimeError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from error.__cause__.__cause__

    def _forward_one(self, *received: torch.Tensor) -> Any:
        """Run this stage on one micro-batch: return what the next one takes, or the loss.

        Where torch wants to know shapes, this takes the first micro-batch and leaves no trace of
        it but buffers, which cannot be put back before the gradients are taken."""
        if self.unlearned:
            self.unlearned = False
            kept = self.tally, deque(self.pending), deque(self.targeted)
            self.tally, self.buffers_before = Tally(self.device), copy_buffers(self.model)
            for tensor in received:
                # torch would receive a gradient into memory that lies as this first one does, and
                # then refuses to where that has gaps. test_workarounds.py tells when it has ceased.
                if tensor.requires_grad:
                    tensor.register_hook(torch.Tensor.contiguous)
            output = self._compute(*received)
            self.tally, self.pending, self.targeted = kept
            return output
        if self.buffers_before:
            restore_buffers(self.model, self.buffers_before)
            self.buffers_before = {}
        return self._compute(*received)

    def _compute(self, *received: torch.Tensor) -> Any:
        output = self.model(received[0] if len(received) == 1 else received)
        return self._take_loss(output) if self.reads_targets else output

    def _step(self, micro_batches: Sequence[MicroBatch], own: int | float) -> None:
        self._begin_step()
        self._set_training(self.model)
        scale = self.loss_factor = self.scale.value
        set_learning_rate(self.optimizer, learning_rate(self.job, self.step))
        self._run(self.schedule, micro_batches, target=self.numbers if self.reads_targets else None)
        self._reduce_tied()
        if self.scale.active:
            self._share_overflow()
            self.scale.unscale(self.optimizer)
        self.norm = self._clip_gradients(
            self.optimizer, [dist.group.WORLD], counts=lambda p: p not in self.counted_before
        )
        finish_step(self.optimizer, self.scale, is_held(self, self.norm))
        rate = read_learning_rate(self.optimizer)
        row = LocalRow(self.tally, own, self.norm, rate, self.input_digest)
        self._note_step([row], scale, bool(self.job.train.clip_norm))

    def _reduce_tied(self) -> None:
        """Sum the gradients of parameters that several stages hold."""
        for parameter, group, _ in self.tied:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)

    def _share_overflow(self) -> None:
        """Make fp16's gradients overflow on all stages where they do on one: all skip the step."""
        gradients = [p.grad for p in parameters_of(self.optimizer) if p.grad is not None]
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        found = finite.logical_not().float()
        dist.all_reduce(found)
        if found:
            gradients[0].fill_(torch.inf)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        self.tally = Tally(self.device, self.counter, self.metrics)
        self.model.eval()
        self.training = False
        for micro_batches in batches:
            number = len(micro_batches)
            if number not in self.evaluations:
                self.evaluations[number] = self._make_schedule(ScheduleGPipe, number)
            self._run(self.evaluations[number], micro_batches)
        return eval_result(self.tally)

    def receipt(self) -> Receipt:
        """Show every rank's stage, the layers it holds, and the schedule."""
        live, lay, asked = self.schedule, self.layout, self.job.strategy.pipeline.schedule
        held, conditions = self._held(live._stage.stage_index, column=0)
        evidence = {
            "model": type(live._stage).__name__,
            "engine": type(live).__module__,
            "schedule": type(live).__name__,
            "stages": live._stage.num_stages,
            "columns": dist.get_world_size() // live._stage.num_stages,
            "micro_batches": live._n_microbatches,
            **held,
        }
        conditions = {
            f"{lay.pp} stages": evidence["stages"] == lay.pp,
            f"{lay.dp} columns": evidence["columns"] == lay.dp,
            f"schedule {asked}": type(live) is SCHEDULES[asked],
            f"{self.micro_batches} micro-batches": live._n_microbatches == self.micro_batches,
            **conditions,
        }
        stepped = Stepped.plain(self.optimizer, self.gradients)
        return self._add_ledger(make_receipt(evidence, conditions), stepped)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def stepper(self) -> torch.optim.Optimizer | None:
        return as_stepper(self.job, self.optimizer)

    def loss_scale_state(self) -> dict[str, float] | None:
        return self.scale.read_state()

    def begin_at(
        self, step: int, loss_scale: Mapping[str, float] | None, own: OwnState | None
    ) -> None:
        super().begin_at(step, loss_scale, own)
        self.scale.set_state(loss_scale)

    def close(self) -> None:
        self.model = self.schedule = None
        self.evaluations, self.tied = {}, []
        del self.optimizer


class _Forward(nn.Module):
    """Is what torch takes for a stage's module: a function of a micro-batch's tensors.

    It has no parameters of its own, since torch does nothing to them here."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *received: torch.Tensor) -> Any:
        """Call the function."""
        return self.function(*received)
