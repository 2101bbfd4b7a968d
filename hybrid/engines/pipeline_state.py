"""This module reads and writes the training state of a stage that DeepSpeed runs.

It is for `pipeline` and `2d`, with and without ZeRO over the columns."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.pieces import Piece
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
from .pipeline_stage import Stage
from .protocol import OwnState, Shapes


class DeepSpeedStage(Stage):
    """Holds the state of one stage in one data-parallel column, for the engine that trains it."""

    engine: Any  # DeepSpeed's
    zero_stage: int  # that DeepSpeed runs
    frozen: FrozenParts  # of what DeepSpeed has rounded

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.engine.optimizer
        return optimizer

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
        return super().pieces()

    def weights(self) -> list[Piece]:
        if self.one_set:
            self.one_set.before_use()
        if not self.zero_stage:
            return super().weights()
        fragments, written = fragments_of(self.engine.optimizer), self._own_tensors(shared=False)
        return weights_of_partitions(written, fragments, self._column_copies(), self.frozen)

    def _pieces_of(self, tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
        if not self.zero_stage:
            return super()._pieces_of(tensors)
        copies = self._column_copies()
        return pieces_of_partitions(tensors, self.engine.optimizer, copies, self.frozen)

    def make_room(self, shapes: Shapes, numbers: Collection[str]) -> None:
        if self.zero_stage:
            make_room_in_partitions(self._tensors(), self.engine.optimizer, shapes, numbers)
        else:
            super().make_room(shapes, numbers)

    def _own_numbers(self) -> list[str]:
        if self.zero_stage:
            return numbers_in_partitions(self.engine.optimizer)
        return super()._own_numbers()

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
        super().load(state)
        if self.zero_stage:
            own = self._own_tensors(shared=True)
            mine = {name: state[name] for name in own if name in state}
            set_masters(own, mine)
            self.frozen.take(own, mine)
