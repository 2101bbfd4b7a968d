"""This module holds what all engines do alike, in the base class that they inherit from."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..checkpoint.gathering import gather_whole
from ..checkpoint.pieces import Piece
from ..data.loader import MicroBatch
from ..job.schema import Job
from ..launch.placement import Placement
from ..models.loss_calls import LossCalls
from ..models.losses import Loss
from ..models.metrics import load_metrics
from ..models.own_loss import OwnLoss, model_input
from ..records import EvalResult, Receipt
from .backward import Backward
from .buffers import OneSet
from .counting import TargetCounter, num_rows
from .guard import Guard, is_held
from .guard_search import guarded_step
from .layers import asks_for_rows, sample_seeds, seed_forward_pass
from .optimizer import LossScale, clip, finish_step, norm_of, parameters_of
from .optimizer_numbers import put_numbers, read_numbers
from .own_optimizer import is_own
from .precision import Observer, Stepped, check_ledger, make_ledger
from .protocol import Engine, OwnState, Shapes, StepResult, extend_receipt
from .state import gradient_dtypes, on_device
from .step_queue import LocalRow, StartedStep, StepQueue, StepRow
from .step_results import norms_of, step_result
from .tally import Tally, eval_result
from .training_state import Copies, make_room, numbers_of, pieces_of, weights_of


class BaseEngine(Engine):
    """Holds the state that every engine has, and the parts of a step that are the same for all.
    A subclass sets the attributes below, and adds the methods of `Engine`, documented there, but
    for steps: it adds `_step`."""

    micro_batch_size: int | None = None
    reads_inputs = reads_targets = True
    model: Any  # the live one; of several replicas, the first
    num_held: int
    observer: Observer
    buffers: str  # the dtypes of the model's buffers before an engine took it

    def __init__(self, job: Job, placement: Placement, loss: Loss) -> None:
        self.job, self.placement, self.loss = job, placement, loss
        self.layout, self.device = placement.layout, placement.device
        function = getattr(loss, "function", loss)
        if isinstance(function, nn.Module):
            function.to(self.device)
        self.counter, self.metrics = TargetCounter(loss, self.device), load_metrics(job)
        self._shown = not self.counter.needs_output  # an output has been shown to the counter
        self.shares: tuple[int, ...] = (placement.dp_rank,)
        self.step = 0  # optimizer steps done
        self.norm_is_due = True  # in this step: to clip, to log, for fp16, or for the guard
        self.asks_for_rows: bool | None = None  # the model; it is known after a step
        self.notes: list[str] = []
        self.training = False  # the model is in the mode for training
        self.digests: tuple[str, ...] = ()  # each rank's samples in the first step
        self.gradients = ""  # the dtypes of the gradients in the first step
        self.queue = StepQueue(self.device, job.log.every, job.checkpoint.every is not None)
        # The ranks whose squares add up to that of the whole norm, where each knows but a part.
        self.norm_parts: list[list[int]] = []
        self.backward = Backward()
        self.one_set: OneSet | None = None  # of buffers, where nothing else keeps one
        # The targets and the samples of all ranks in this step, once they are known.
        self._count: int | float | None = None
        self._samples: int | None = None
        self.guard = Guard(job) if job.guard else None
        self.tallies: list[Tally] = []  # of each replica here in this step, for the guard

    def start_step(
        self,
        micro_batches: Sequence[MicroBatch],
        count: int | float | None = None,
        samples: int | None = None,
    ) -> None:
        if not self._shown:
            self._shown = True
            self._show([[micro_batch.copied() for micro_batch in micro_batches[:1]]])
        self._count, self._samples, own = count, samples, self._count_own(micro_batches)
        self.norm_is_due = self._takes_norm()
        number = self._number_to_send(micro_batches, own, count)
        if number is not None or self.queue.is_due():
            self.queue.send(number)
        if self.guard:
            guarded_step(self, self.guard, micro_batches, lambda given: self._step(given, own))
        else:
            self._step(micro_batches, own)
        self.step += 1
        if self.asks_for_rows is None:
            self.observer.stop()
            self.asks_for_rows = asks_for_rows(self.model)

    def _show(self, batches: Iterable[Sequence[MicroBatch]]) -> None:
        """Show the counter an output, before the first step here."""
        self.evaluate(batches)

    def _step(self, micro_batches: Sequence[MicroBatch], own: int | float) -> None:
        """Make one optimizer step, and note it by `_note_step`.
        own: the targets that this rank's loss will count."""
        raise NotImplementedError

    def _count_own(self, micro_batches: Iterable[MicroBatch]) -> int | float:
        return sum([self.counter.count(micro_batch) for micro_batch in micro_batches])

    def _number_to_send(
        self, micro_batches: Sequence[MicroBatch], own: int | float, count: int | float | None
    ) -> int | float | None:
        """Return the number that the ranks must tell one another in this step, None: there is none.

        It is that of this rank's targets, unless the plan tells the count of all."""
        return own if count is None else None

    def _count_all(self) -> int | float:
        """Return how many targets the losses of all ranks will count in this step.

        It waits for what the others sent, where the plan does not tell it."""
        if self._count is None:
            self._count = sum(self.queue.sent())
        return self._count

    def results(self, wait: bool = True) -> list[StepResult]:
        if wait:
            self.queue.send()
        if not self.queue.travelling:
            return []  # as in most steps, where some are read together
        found = [self._result(step, rows) for step, rows in self.queue.take()]
        if found and not self.digests:
            self.digests = found[0].digest_by_rank
        return found

    def _result(self, step: StartedStep, rows: list[StepRow]) -> StepResult:
        return step_result(step, rows, norms_of(step, rows, self.norm_parts))

    def pieces(self) -> list[Piece]:
        return pieces_of(self._tensors(), self._optimizer(), self._copies())

    def weights(self) -> list[Piece]:
        return weights_of(self._tensors(), self._copies())

    def state(self) -> dict[str, torch.Tensor]:
        return gather_whole(self.weights())

    def make_room(self, shapes: Shapes, numbers: Collection[str]) -> None:
        make_room(self._tensors(), self._optimizer(), shapes, numbers)

    def numbers_kept(self) -> list[str]:
        return numbers_of(self._optimizer())

    def optimizer_numbers(self) -> dict[str, Any]:
        return read_numbers(self._optimizer()) if is_own(self.job) else {}

    def set_optimizer_numbers(self, saved: Mapping[str, Any]) -> None:
        if saved:
            put_numbers(self._optimizer(), saved)

    def stepper(self) -> torch.optim.Optimizer | None:
        return None

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the live tensors that this rank has a part of, by canonical name."""
        raise NotImplementedError

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of torch's kind that steps them."""
        raise NotImplementedError

    def _copies(self) -> Copies:
        """Tell which of how many ranks this is, among those that hold whole tensors alike."""
        return Copies(self.placement.rank, self.placement.world_size)

    def loss_scale_state(self) -> dict[str, float] | None:
        return None

    def own_state(self) -> OwnState:
        return OwnState({}, {})

    def begin_at(
        self, step: int, loss_scale: Mapping[str, float] | None, own: OwnState | None
    ) -> None:
        self.step = step

    def skip_to(self, step: int) -> None:
        self.step = step

    def rehearse(self, micro_batches: Sequence[MicroBatch]) -> None:
        pass

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        self.start_step(micro_batches)
        return self.results()[-1]

    def _forward(
        self, model: Any, micro_batch: MicroBatch, place: Sequence[int], tally: Tally
    ) -> torch.Tensor:
        """Return the summed loss of one training micro-batch; `place`: see `sample_seeds`."""
        micro_batch = on_device(micro_batch, self.device)
        given = model_input(self.loss, micro_batch.input, micro_batch.target)
        if self.asks_for_rows is False:
            seed_forward_pass(self.job.train.seed, self.step, *place)
            return tally.add(self.loss, model(given), micro_batch)
        rows = num_rows(micro_batch.target)
        with sample_seeds(self.job, self.step, place, micro_batch.ids, rows):
            return tally.add(self.loss, model(given), micro_batch)

    def _set_training(self, *models: nn.Module) -> None:
        """Put models back into the mode for training, which takes a walk through all modules.

        A model's own `training` does not tell: DeepSpeed's engine never changes its."""
        if not self.training:
            for model in models:
                model.train()
            self.training = True

    def _takes_norm(self) -> bool:
        """Tell whether this step's norm is needed: to clip, to log, for fp16, or for the guard."""
        train, done = self.job.train, self.step + 1
        logged = self.step == 0 or done == train.steps or done % self.job.log.every == 0
        return logged or bool(train.clip_norm or self.guard) or train.precision == "fp16"

    def _clip_gradients(
        self,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[Any] = (),
        counts: Callable[[Any], bool] | None = None,
    ) -> torch.Tensor | float:
        """Clip an optimizer's reduced gradients as the job says, and return their global norm.

        groups: process groups over which its square adds up. If nothing is clipped, the result is
        this rank's part. nan: not taken. counts: whether a parameter counts here, None: all do."""
        if self.gradients and not self.norm_is_due:
            return math.nan
        parameters = parameters_of(optimizer)
        self.gradients = self.gradients or gradient_dtypes(parameters)
        if not self.norm_is_due:
            return math.nan
        norm = norm_of(parameters if counts is None else filter(counts, parameters))
        if self.job.train.clip_norm:
            if groups:
                square = norm.square()
                for group in groups:
                    dist.all_reduce(square, group=group)
                norm = square.sqrt()
            clip(parameters, norm, self.job.train.clip_norm)
        return norm

    def _clip_and_step(
        self, optimizer: torch.optim.Optimizer, scale: LossScale, groups: Sequence[Any] = ()
    ) -> torch.Tensor | float:
        """Make one optimizer step, and return what `_clip_gradients` does.
        The norm is not finite where an fp16 gradient overflowed."""
        if scale.active:
            scale.unscale(optimizer)
        norm = self._clip_gradients(optimizer, groups)
        finish_step(optimizer, scale, is_held(self, norm))
        return norm

    def _note_step(self, rows: Sequence[LocalRow], loss_scale: float, whole: bool = True) -> None:
        """Note a step's numbers. rows: one for each replica.

        loss_scale: in force in the step; only fp16 has one. whole: see `StartedStep`."""
        scale = loss_scale if self.job.train.precision == "fp16" else None
        fault = self.guard.fault if self.guard else None
        took, samples = self.norm_is_due, self._samples
        self.queue.add(StartedStep(self.step, list(rows), whole, took, scale, fault, samples))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        tally = Tally(self.device, self.counter, self.metrics)
        if self.one_set:
            self.one_set.before_use()
        self.model.eval()
        self.training = False
        for micro_batch in itertools.chain.from_iterable(batches):
            micro_batch, calls = on_device(micro_batch, self.device), []
            given = model_input(self.loss, micro_batch.input, micro_batch.target)
            if isinstance(self.loss, OwnLoss):
                with LossCalls() as watched:
                    output = self.model(given)
                calls = watched.calls
                self.loss.learn(calls, output, micro_batch.target)
            else:
                output = self.model(given)
            tally.add(self.loss, output, micro_batch, score=True, calls=calls)
        return eval_result(tally)

    def _add_ledger(self, receipt: Receipt, stepped: Stepped) -> Receipt:
        """Return the receipt with this rank's precision ledger, which must meet its conditions."""
        ledger = make_ledger(self.observer, self.model, stepped)
        conditions = check_ledger(self.job.train.precision, self.buffers, ledger)
        return extend_receipt(receipt, {"precision": ledger}, conditions)
