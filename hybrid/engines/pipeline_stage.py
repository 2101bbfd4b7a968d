"""This module holds what the stages of all pipelines do alike, whose engine ever runs them.

A stage has its own layers' tensors by their canonical names. What several stages hold, tied
parameters and buffers, stands once in a checkpoint: the first of these stages writes it with its
optimizer's state, and each of them loads it."""

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint.pieces import WRITTEN_ELSEWHERE, Piece
from ..data.loader import MicroBatch
from ..job.errors import RunError
from ..job.schema import Job
from ..job.strategy_settings import Stages
from ..launch.exchange import gather_objects
from ..launch.placement import Placement
from ..layout import micro_batch_size
from ..models.batch_norms import leave_padding_out
from ..models.layers import Layers
from ..models.losses import Loss
from ..stages.assignment import StageAssignment
from .base import BaseEngine
from .hashes import Samples
from .layers import seed_forward_pass, set_sample_seeds
from .optimizer import no_decay_names
from .precision import Observer, names_of
from .protocol import StepResult
from .state import copy_state, named_tensors, on_device
from .step_queue import StartedStep, StepRow
from .tally import Tally
from .training_state import Copies, numbers_of, pieces_of, weights_of


class Stage(BaseEngine):
    """Holds one stage of a pipeline in one data-parallel column.

    The first stage reads inputs, and so does each stage of a module that is cut; the last reads
    targets. Each digests the sample ids it read, since an engine would not notice two different
    batches (deepspeedai/DeepSpeed#5729).

    A subclass makes the engine that passes tensors between stages: it sets the `model`, in which
    the stage's own module has a number for a name, and adds steps, evaluation and the receipt."""

    def __init__(
        self, job: Job, placement: Placement, layers: Layers, loss: Loss, name: str
    ) -> None:
        super().__init__(job, placement, loss)
        settings = job.settings(name)
        assert isinstance(settings, Stages)
        self.stage = placement.stage
        # How many stages of a column read inputs: those after the first have no other way to them.
        self.num_readers = self.layout.pp if layers.feeds_all_stages else 1
        self.reads_inputs = self.stage < self.num_readers
        self.reads_targets = self.stage == self.layout.pp - 1
        self.micro_batches = job.micro_batches(name)
        batch = job.train.global_batch
        self.micro_batch_size = micro_batch_size(batch, self.layout.dp, self.micro_batches)
        self.assignment = StageAssignment(layers, settings.partition, placement)
        self.observer = Observer(layers, job.train.compile)
        self.tally = Tally(self.device)
        self.inputs = Samples()  # that this stage read in this step
        self.norm: torch.Tensor | float = math.nan  # of the gradients' norm in this step
        # The micro-batches whose forward pass, or loss, is still to come.
        self.pending: deque[MicroBatch] = deque()
        self.targeted: deque[MicroBatch] = deque()
        columns = range(self.layout.dp)
        ranks = range(self.layout.world_size)
        self.norm_parts = [[r for r in ranks if self.layout.dp_rank(r) == c] for c in columns]

    def _own_module(self, layers: Layers) -> tuple[nn.Module, set[str]]:
        """Return a module of this rank's layers, and the names of what has no weight decay.
        The other layers are freed, once the caller lets go of them."""
        no_decay = no_decay_names(layers, self.job.optimizer.no_decay)
        own = layers.join(self.assignment.part)
        layers.fill(own)
        leave_padding_out(own.modules())
        self.buffers = names_of(own.buffers())
        return own, no_decay

    def _begin_step(self) -> None:
        """Forget the numbers of the step before."""
        self.tally, self.inputs, self.norm = Tally(self.device), Samples(), math.nan
        self.tallies = [self.tally]

    def _count_own(self, micro_batches: Iterable[MicroBatch]) -> int | float:
        """Count targets on the last stage alone, which takes the loss."""
        return super()._count_own(micro_batches if self.reads_targets else [])

    def _feed(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Take the micro-batches that the engine runs next, in their order.

        Engines pass tensors and tuples of them alone along a pipeline. So each stage takes what it
        needs of a data set from its own list, and engines are given nothing."""
        if self.reads_inputs:
            self.inputs = Samples([micro_batch.ids for micro_batch in micro_batches])
        self.pending, self.targeted = deque(micro_batches), deque(micro_batches)

    def _start(self, module: nn.Module, args: Any) -> Any:
        """Seed a forward pass of this stage, and give it the input of its micro-batch.

        It is a hook before the stage's own module, or called as one: None leaves its `args`."""
        number, micro_batch = self.micro_batches - len(self.pending), self.pending.popleft()
        if module.training:
            place = (*self.shares, number, self.stage)
            if self.asks_for_rows is False:
                seed_forward_pass(self.job.train.seed, self.step, *place)
            else:
                ids, rows = micro_batch.ids, self.micro_batch_size or 1
                set_sample_seeds(self.job, self.step, place, ids, rows)
        if not self.reads_inputs:
            return None
        value = on_device(micro_batch, self.device).input
        if hasattr(module, "stage_inputs"):
            module.stage_inputs = value
            return None
        return (value,)

    def _take_loss(self, output: Any) -> torch.Tensor:
        """Compute the sum of a micro-batch's losses on the last stage, also in an evaluation."""
        micro_batch = on_device(self.targeted.popleft(), self.device)
        score = not torch.is_grad_enabled()
        return self.tally.add(self.loss, output, micro_batch, score)

    def _result(self, step: StartedStep, rows: list[StepRow]) -> StepResult:
        result = super()._result(step, rows)
        inputs = f"{sum(row.input_digest for row in rows) % 2**64:016x}"
        targets = f"{self.num_readers * int(result.sample_digest, 16) % 2**64:016x}"
        if inputs != targets:
            raise RunError(
                f"step {step.number}: inputs that stages read (digest {inputs}) and the last "
                f"stage's targets (digest {targets}) are of different samples"
            )
        return result

    def _held(self, stage: int, column: int) -> tuple[dict[str, Any], dict[str, bool]]:
        """Return what every rank's stage holds, and the conditions on it; collective.

        stage, column: this rank's, read off the live engine."""
        assignment, lay = self.assignment, self.layout
        mine = {
            "stage": stage,
            "column": column,
            "layers": assignment.live_layers(self.model),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tied": assignment.tied_digest(),
        }
        ranks = gather_objects(mine)
        tensors = gather_objects(list(self._own_tensors(shared=True)))
        firsts = [i for i, rank in enumerate(ranks) if rank["column"] == 0]
        layers = [ranks[i]["layers"] for i in firsts]
        evidence = {
            "ranks": ranks,
            "layers_by_stage": layers,
            "tensors_by_stage": [tensors[i] for i in firsts],
            "sample_digest_by_rank": list(self.digests),
        }
        return evidence, {
            "every stage where the layout puts it": all(
                (r["stage"], r["column"]) == (lay.stage(i), lay.dp_rank(i))
                for i, r in enumerate(ranks)
            ),
            "every layer on its stage": layers == assignment.layers_by_stage,
            "columns alike": all(r["layers"] == layers[r["stage"]] for r in ranks),
            "tied weights equal on all stages": assignment.tied_agree([r["tied"] for r in ranks]),
        }

    def _own_tensors(self, shared: bool) -> dict[str, torch.Tensor]:
        """Return the live stage's tensors; `shared`: also those that an earlier stage holds."""
        return self.assignment.own_tensors(named_tensors(self.model), shared)

    def _column_copies(self) -> Copies:
        """Tell which column this is, among those that hold this stage's tensors alike."""
        return Copies(self.placement.dp_rank, self.layout.dp)

    def pieces(self) -> list[Piece]:
        written, held = self._own_tensors(shared=False), self._own_tensors(shared=True)
        return [
            p if p.name in written else dataclasses.replace(p, copies=WRITTEN_ELSEWHERE)
            for p in self._pieces_of(held)
        ]

    def _pieces_of(self, tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
        """Return this rank's parts of the stage's tensors, as its column shares out the writing."""
        return pieces_of(tensors, self._optimizer(), self._column_copies())

    def weights(self) -> list[Piece]:
        return weights_of(self._own_tensors(shared=False), self._column_copies())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self._own_tensors(shared=True)

    def numbers_kept(self) -> list[str]:
        """Return the keys of all stages: an optimizer may treat their parameters differently."""
        kept: Sequence[list[str]] = gather_objects(self._own_numbers())
        return sorted({key for keys in kept for key in keys})

    def _own_numbers(self) -> list[str]:
        """Return the keys of this stage's optimizer."""
        return numbers_of(self._optimizer())

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        own = self._own_tensors(shared=True)
        copy_state(own, {name: state[name] for name in own if name in state})


def make_contiguous(output: Any) -> Any:
    """Make a stage's output contiguous: nothing else can be sent."""
    if isinstance(output, tuple):
        return tuple(t.contiguous() for t in output)
    return output.contiguous()
