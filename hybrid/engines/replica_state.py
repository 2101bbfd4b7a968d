"""This module keeps the state of replicas that step alone, for checkpoints of it.

The canonical state is the one that a merge now would give; what each replica has by itself stands
beside it, in the files of the ranks."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.pieces import Piece
from ..launch.exchange import gather_objects
from .base import BaseEngine
from .merged_state import copied_pieces, merged_pieces, own_tensors, put_own_tensors
from .optimizer import LossScale
from .optimizer_numbers import as_json, from_json, put_numbers, read_numbers
from .own_optimizer import is_own
from .protocol import OwnState, Shapes
from .state import copy_state, named_tensors
from .training_state import as_stepper, make_room, numbers_of, pieces_of


class ReplicaState(BaseEngine):
    """Shows replicas of a model as one state. A subclass steps and merges them.

    merges: so many there were. drifts: with their steps, not read yet."""

    models: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    scales: list[LossScale]
    merge_every: int | None
    seen: list[int]
    all_seen: int | None
    merges: int
    drifts: list[tuple[int, torch.Tensor]]
    drift: list[dict[str, float]]
    _loading = False  # the pieces are there to be written

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for model in self.models:
            copy_state(named_tensors(model), state)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return named_tensors(self.model)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers[0]

    @property
    def _differ(self) -> bool:
        """Tell whether there are several replicas, which have states of their own."""
        return self.merge_every is not None and self.layout.dp > 1

    def _pieces_of_each(self) -> list[list[Piece]]:
        pairs = zip(self.models, self.optimizers, strict=True)
        return [pieces_of(named_tensors(m), o, self._copies()) for m, o in pairs]

    def pieces(self) -> list[Piece]:
        """Return the state that a merge now would give; what is written goes to all replicas."""
        if not self._differ:
            return super().pieces()
        if self._loading:
            return copied_pieces(self._pieces_of_each())
        seen = [n for rank in gather_objects(self.seen) for n in rank]
        weights = [n / sum(seen) if any(seen) else 1 / len(seen) for n in self.seen]
        return merged_pieces(self._pieces_of_each(), weights, *self._copies())

    def make_room(self, shapes: Shapes, numbers: Collection[str]) -> None:
        self._loading = True
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            make_room(named_tensors(model), optimizer, shapes, numbers)

    def numbers_kept(self) -> list[str]:
        found = {key for optimizer in self.optimizers for key in numbers_of(optimizer)}
        return sorted(found.union(*gather_objects(found)))

    def set_optimizer_numbers(self, saved: Mapping[str, Any]) -> None:
        for optimizer in self.optimizers:
            put_numbers(optimizer, saved)

    def stepper(self) -> torch.optim.Optimizer | None:
        return None if self._differ else as_stepper(self.job, self._optimizer())

    def loss_scale_state(self) -> dict[str, float] | None:
        return self.scales[0].read_state()

    def own_state(self) -> OwnState:
        """Return the tensors and the numbers of this process's replicas, where these differ."""
        if not self._differ:
            return super().own_state()
        self._read_drift()
        drift = self.drift if self.placement.rank == 0 else []
        numbers = {
            "seen": self.seen,
            "loss_scales": [scale.read_state() for scale in self.scales],
            "optimizers": [read_numbers(o) if is_own(self.job) else {} for o in self.optimizers],
            "merges": self.merges,
            "drift": [{key: as_json(value) for key, value in one.items()} for one in drift],
        }
        return OwnState(own_tensors(self._pieces_of_each()), numbers)

    def begin_at(
        self, step: int, loss_scale: Mapping[str, float] | None, own: OwnState | None
    ) -> None:
        super().begin_at(step, loss_scale, own)
        self._loading = False
        for scale in self.scales:
            scale.set_state(loss_scale)
        if own is not None and self._differ:
            self._take_over(own)

    def _take_over(self, own: OwnState) -> None:
        """Take over what `own_state` returned; collective."""
        for i, piece in put_own_tensors(self._pieces_of_each(), own.tensors):
            # A step that overflowed leaves an optimizer without the state that others have.
            parameter = named_tensors(self.models[i])[piece.name]
            state: Any = self.optimizers[i].state[parameter]
            state.pop(piece.key)
            if all(value is None for value in state.values()):
                state.clear()
        self.seen = list(own.numbers["seen"])
        self.all_seen = sum(n for seen in gather_objects(self.seen) for n in seen)
        parts = zip(self.optimizers, own.numbers["optimizers"], strict=True)
        for optimizer, numbers in parts:
            put_numbers(optimizer, numbers)
        for scale, state in zip(self.scales, own.numbers["loss_scales"], strict=True):
            scale.set_state(state)
        drift = gather_objects(own.numbers["drift"])[0]
        self.drift = [{key: from_json(value) for key, value in one.items()} for one in drift]
        self.merges = own.numbers.get("merges", len(drift))  # all had one in older checkpoints

    def _read_drift(self) -> None:
        """Read how far all replicas were from their mean, relative to its length; collective."""
        mine = [tensor.tolist() for _, tensor in self.drifts]
        ranks = gather_objects(mine)
        for i, (step, _) in enumerate(self.drifts):
            every = [away for rank in ranks for away in rank[i]]
            self.drift.append(
                {
                    "step": step,
                    "max_relative_drift": max(every),
                    "mean_relative_drift": sum(every) / len(every),
                }
            )
        self.drifts = []
