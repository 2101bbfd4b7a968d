"""This module keeps the fp32 values of parameters that are not trained and that an engine rounds.

DeepSpeed has fp32 master weights of trained parameters alone. It rounds the others to bf16 or fp16
for good, so that a checkpoint of one strategy would not be that of another. Here each rank keeps
its part of them in fp32: the parts are equal but for the last, as ZeRO-3 cuts parameters. While
DeepSpeed takes a model, so are those of trained parameters (`restore_fp32_masters`)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..checkpoint.pieces import WEIGHT, Piece


class FrozenParts:
    """Holds a rank's part of each parameter that is not trained, as it was before it was rounded.
    trained: of each one that is. One without a value yet is kept by `keep`.

    rank, ranks: this rank's place among those over which the parts are spread. group: these, once
    they are known; None: all. The parts stay on the host where the model was made there."""

    def __init__(
        self, parameters: Iterable[torch.Tensor], rank: int, ranks: int, trained: bool = False
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.group: Any = None
        self.parts: dict[torch.Tensor, torch.Tensor] = {}
        self.shapes: dict[torch.Tensor, torch.Size] = {}
        self.trained = trained
        for parameter in parameters:
            if not parameter.is_meta:
                self.keep(parameter)

    def keep(self, parameter: torch.Tensor) -> None:
        """Keep this rank's part of a parameter, if it is one of those that are kept here."""
        if parameter.requires_grad == self.trained and parameter.is_floating_point():
            self.shapes[parameter] = parameter.shape
            self.parts[parameter] = self._part_of(parameter.detach())

    def _part_of(self, value: torch.Tensor) -> torch.Tensor:
        start, end = (self._start(value.numel(), rank) for rank in (self.rank, self.rank + 1))
        return value.reshape(-1)[start:end].clone()

    def _start(self, size: int, rank: int) -> int:
        """Return where a rank's part of `size` elements begins."""
        return min(-(-size // self.ranks) * rank, size)

    def piece(self, name: str, parameter: torch.Tensor) -> Piece:
        """Return this rank's part of a parameter as a piece of a checkpoint."""
        shape = self.shapes[parameter]
        start = self._start(shape.numel(), self.rank)
        return Piece(name, WEIGHT, tuple(shape), self.parts[parameter], start)

    @torch.no_grad()
    def round(self) -> None:
        """Give the live parameters the values of the parts, rounded; collective."""
        for parameter, part in self.parts.items():
            live: Any = parameter
            if hasattr(live, "ds_tensor"):  # ZeRO-3
                live.ds_tensor.view(-1)[: part.numel()].copy_(part)
            else:
                live.copy_(self._gather(parameter, part.to(live.dtype)))

    def whole(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter's exact value; collective."""
        return self._gather(parameter, self.parts[parameter])

    def _gather(self, parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        shape = self.shapes[parameter]
        full = self._start(shape.numel(), 1)
        padded = torch.nn.functional.pad(part, (0, full - part.numel())).to(parameter.device)
        parts = [torch.empty_like(padded) for _ in range(self.ranks)]
        if self.ranks == 1:
            return padded.view(shape)
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts)[: shape.numel()].view(shape)

    def take(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Take this rank's parts of full values, by the parameters' names."""
        for name, tensor in tensors.items():
            if tensor in self.parts:
                part = self.parts[tensor]
                part.copy_(self._part_of(state[name]))
