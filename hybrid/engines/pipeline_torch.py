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
from .pipeline_stage import Stage, make_contiguous
from .pipelining_calls import EarlyReceives, StageModule, forget_hooks, spare_calls
from .precision import DTYPES, Stepped, round_at_use
from .protocol import OwnState, make_receipt
from .schedule import learning_rate
from .state import num_held
from .step_queue import LocalRow
from .tally import Tally, eval_result
from .training_state import as_stepper

SCHEDULES: dict[str, Callable[..., Any]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
IN_PLACE = "leaf Variable that requires grad is being used in an in-place operation"


class TorchStage(Stage):
    """Trains one stage of a pipeline, by a schedule of torch's.

    torch passes tensors of fixed shapes between stages, and learns these by one forward and one
    backward pass more, before a schedule's first micro-batch."""

    def __init__(
        self, job: Job, placement: Placement, layers: Layers, loss: Loss, name: str
    ) -> None:
        super().__init__(job, placement, layers, loss, name)
        self.own, no_decay = self._own_module(layers)
        # Under its number, as DeepSpeed names it.
        self.model = nn.Sequential(OrderedDict({str(self.stage): self.own})).to(self.device)
        self.num_held = num_held(self.model)
        parameters = self.assignment.parameters(self.own)
        self.optimizer = build_optimizer(job, parameters, no_decay)
        round_at_use(self.model, DTYPES[job.train.precision])
        self.tied = self.assignment.tied()
        self.counted_before = {p for p, _, first in self.tied if not first}  # by another stage
        self.scale = LossScale(job, self.device)
        self.scale.scale(torch.ones((), device=self.device))  # it makes its own tensors by a loss
        # A group of all ranks once more, over gloo alone.
        self.for_gradients = dist.new_group() if self.device.type == "cpu" else None
        kind = SCHEDULES[job.strategy.pipeline.schedule]
        self.schedule = self._make_schedule(kind, self.micro_batches, lambda loss, _: loss)
        self.numbers = torch.zeros(self.micro_batches)  # of which torch wants one a micro-batch
        self.evaluations: dict[int, Any] = {}  # schedules, by their micro-batches
        self.copies = False  # what it receives, since its first layer changes that in place

    def _make_schedule(self, kind: Callable[..., Any], number: int, loss: Any = None) -> Any:
        """Make a schedule of `number` micro-batches, with tensors to receive theirs.

        loss: makes it take gradients too. The last stage gives it what it takes these of."""
        run = StageModule(self._try)
        stage = PipelineStage(run, self.stage, self.layout.pp, self.device)
        spare_calls(stage, self._first_gradient)
        if self.for_gradients is not None:
            EarlyReceives(stage, number, self.for_gradients)
        return kind(stage, number, loss_fn=loss, scale_grads=False)

    def _run(self, schedule: Any, micro_batches: Sequence[MicroBatch], **options: Any) -> None:
        """Run a schedule over micro-batches, and raise what a stage's module raises as it is.

        torch would raise an error of its own in place of it, with the shapes of all arguments."""
        self._feed(micro_batches)
        try:
            schedule.step(return_outputs=False, **options)
        except RuntimeError as error:
            if error.__cause__ is None or "failed to run forward" not in str(error):
                raise
            raise error.__cause__ from error.__cause__.__cause__
        forget_hooks(schedule._stage)

    def _try(self, run: StageModule, *received: torch.Tensor) -> Any:
        """Run a schedule's first micro-batch once more, by which torch learns shapes.

        It leaves no trace but in buffers, which are put back once its gradients are taken."""
        kept, buffers = (self.tally, self.pending, self.targeted), copy_buffers(self.model)

        def begin() -> None:
            self.tally, self.pending, self.targeted = Tally(self.device), *map(deque, kept[1:])
            self.pending[0] = self.pending[0].copied()

        begin()
        for tensor in received:
            # torch would receive a gradient into memory that lies as this first one does, and then
            # refuses to where that has gaps. test_workarounds_pipelining.py tells when it ceased.
            if tensor.requires_grad:
                tensor.register_hook(torch.Tensor.contiguous)
        try:
            output = self._compute(run, *received)
        except RuntimeError as error:
            if IN_PLACE not in str(error):
                raise
            self.copies = True
            begin()
            output = self._compute(run, *received)
        self.tally, self.pending, self.targeted = kept

        def after_the_trial(run: StageModule, *received: torch.Tensor) -> Any:
            restore_buffers(self.model, buffers)
            run.function = self._compute
            return self._compute(run, *received)

        run.function = after_the_trial
        return output

    def _compute(self, run: StageModule, *received: torch.Tensor) -> Any:
        """Run this stage on one micro-batch: return what the next one takes, or the loss."""
        if self.copies:
            received = tuple([tensor.clone() for tensor in received])
        value = received[0] if len(received) == 1 else received
        (value,) = self._start(self.own, None) or (value,)
        output = self.model(value)
        return self._take_loss(output) if self.reads_targets else make_contiguous(output)

    def _step(self, micro_batches: Sequence[MicroBatch], own: int | float) -> None:
        self._begin_step()
        self._set_training(self.model)
        scale = self.scale.value
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
        row = LocalRow(self.tally, own, self.norm, rate, self.inputs)
        self._note_step([row], scale, bool(self.job.train.clip_norm))

    def _first_gradient(self, loss_sum: torch.Tensor) -> torch.Tensor:
        """Return that of a micro-batch's losses, of which the mean over the batch is trained."""
        return self.backward.first(loss_sum, 1 / (self._count_all() or 1), self.scale)

    def _reduce_tied(self) -> None:
        """Sum the gradients of parameters that several stages hold."""
        for parameter, group, _ in self.tied:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)

    def _share_overflow(self) -> None:
        """Make fp16's gradients overflow on all stages where they do on one: all skip the step."""
        gradients = [p.grad for p in parameters_of(self.optimizer) if p.grad is not None]
        bad = [gradient.isfinite().all().logical_not() for gradient in gradients]
        found = torch.stack([torch.zeros((), dtype=torch.bool, device=self.device), *bad]).sum()
        dist.all_reduce(found)
        if found:
            for gradient in gradients:
                gradient.fill_(torch.inf)

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
        self.model = self.own = self.schedule = None  # type: ignore[assignment]
        self.evaluations, self.tied = {}, []
        del self.optimizer
