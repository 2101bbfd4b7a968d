"""This module reads and writes the training state of a pipeline's stage, in `pipeline` and `2d`.

A stage has its own layers' tensors by their canonical names. What several stages hold, tied
parameters and buffers, stands once in a checkpoint: the first of these stages writes it with its
optimizer's state, and each of them loads it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint.pieces import WRITTEN_ELSEWHERE, Piece
from ..launch.exchange import gather_objects
from ..stages.assignment import StageAssignment
from .base import BaseEngine
from .buffers import OneSet
from .deepspeed_scale import read_counts, read_loss_scale, scaler_of, set_progress
from .deepspeed_setup import set_masters
from .deepspeed_state import (
    fragments_of,
    make_room_in_partitions,
    numbers_in_partitions,
    pieces_of_partitions,
    update_parameters,
    weights_of_partitions,
)
from .frozen import FrozenParts
from .protocol import OwnState, Shapes
from .state import copy_state, named_tensors
from .training_state import Copies, make_room, numbers_of, pieces_of, weights_of


class StageState(BaseEngine):
    """Holds the state of one stage in one data-parallel column, for the engine that trains it."""

    engine: Any  # DeepSpeed's
    assignment: StageAssignment
    zero_stage: int  # that DeepSpeed runs
    frozen: FrozenParts  # of what DeepSpeed has rounded

    def _own_tensors(self, shared: bool) -> dict[str, torch.Tensor]:
        """Return the live stage's tensors; `shared`: also those that an earlier stage holds."""
        return self.assignment.own_tensors(named_tensors(self.model), shared)

    def _make_one_set(self) -> OneSet | None:
        """Return what keeps the columns' buffers alike, where there are several columns."""
        if self.layout.dp == 1:
            return None
        group = self.engine.grid.get_data_parallel_group()
        return OneSet(self.model, group, self.placement.rank - self.placement.dp_rank)

    def _keep_frozen(self, stage: nn.Module) -> FrozenParts:
        """Return the fp32 values of what DeepSpeed is about to round and no optimizer has.
        Each column keeps a part of them."""
        rounds = self.job.train.precision != "fp32"
        parameters = stage.parameters() if rounds else ()
        return FrozenParts(parameters, self.placement.dp_rank, self.layout.dp)

    def pieces(self) -> list[Piece]:
        if self.one_set:
            self.one_set.before_use()
        written, held = self._own_tensors(shared=False), self._own_tensors(shared=True)
        return [
            p if p.name in written else dataclasses.replace(p, copies=WRITTEN_ELSEWHERE)
            for p in self._pieces_of(held)
        ]

    def weights(self) -> list[Piece]:
        if self.one_set:
            self.one_set.before_use()
        written, copies = self._own_tensors(shared=False), self._column_copies()
        if not self.zero_stage:
            return weights_of(written, copies)
        fragments = fragments_of(self.engine.optimizer)
        return weights_of_partitions(written, fragments, copies, self.frozen)

    def _column_copies(self) -> Copies:
        """Tell which column this is, among those that hold this stage's tensors alike."""
        return Copies(self.placement.dp_rank, self.layout.dp)

    def _pieces_of(self, tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
        """Return this rank's parts of the stage's tensors, as its column shares out the writing."""
        copies = self._column_copies()
        if self.zero_stage:
            return pieces_of_partitions(tensors, self.engine.optimizer, copies, self.frozen)
        return pieces_of(tensors, self.engine.optimizer, copies)

    def make_room(self, shapes: Shapes, numbers: Collection[str]) -> None:
        make = make_room_in_partitions if self.zero_stage else make_room
        make(self._own_tensors(shared=True), self.engine.optimizer, shapes, numbers)

    def numbers_kept(self) -> list[str]:
        """Return the keys of all stages: an optimizer may treat their parameters differently."""
        find = numbers_in_partitions if self.zero_stage else numbers_of
        kept: Sequence[list[str]] = gather_objects(find(self.engine.optimizer))
        return sorted({key for keys in kept for key in keys})

    def loss_scale_state(self) -> dict[str, float] | None:
        return read_loss_scale(scaler_of(self.engine))

    def own_state(self) -> OwnState:
        return OwnState({}, read_counts(scaler_of(self.engine)))

    def begin_at(
        self, step: int, loss_scale: Mapping[str, float] | None, own: OwnState | None
    ) -> None:
        super().begin_at(step, loss_scale, own)
        set_progress(self.engine, step, loss_scale, own.numbers if own else {})
        if self.zero_stage:
            self.frozen.round()
            update_parameters(self.engine.optimizer)
        self.one_set = self._make_one_set()

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        own = self._own_tensors(shared=True)
        mine = {name: state[name] for name in own if name in state}
        copy_state(own, mine)
        if self.zero_stage:
            set_masters(own, mine)
            self.frozen.take(own, mine)
