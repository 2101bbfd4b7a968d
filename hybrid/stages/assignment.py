"""This module finds the layers of this rank's stage, and the parameters that stages share."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..job.strategy_settings import Partition
from ..launch.placement import Placement
from ..models.layers import Layers, holders_of
from .partition import partition


class StageAssignment:
    """Says where the layers of a model go, seen from one rank.

    It is made on the whole model, before its layers are joined. A parameter that layers of several
    stages hold is tied: each of these stages has a copy, their gradients are summed over the stages
    once a step, and the first of them counts it."""

    def __init__(self, layers: Layers, method: Partition, placement: Placement) -> None:
        sizes, layout = layers.sizes(), placement.layout
        parts = partition(method, sizes, layout.pp)
        self.layout, self.rank, self.stage = layout, placement.rank, placement.stage
        self.part = parts[self.stage]
        self.layers_by_stage = [list(part) for part in parts]
        stage_of = [stage for stage, part in enumerate(parts) for _ in part]
        names = layers.names()
        stages = {p: sorted({stage_of[i] for i in held}) for p, held in holders_of(layers).items()}
        # No parameter of another stage may be kept here, so that this rank can free it.
        self._names = {p: names[p] for p, held in stages.items() if self.stage in held}
        self._stages = {p: held for p, held in stages.items() if self.stage in held}
        self._layers_of = {
            name: [i for i in self.part if any(p is q for q in layers[i].parameters())]
            for p, name in self._names.items()
        }
        self._bare = [i for i in self.part if not any(True for _ in layers[i].parameters())]
        owners = layers.buffer_owners()
        self._foreign = {name for name, i in owners.items() if stage_of[i] != self.stage}
        self._tied_sets = sorted({tuple(held) for held in stages.values() if len(held) > 1})

    @property
    def has_ties(self) -> bool:
        """Tell whether several stages hold a copy of one parameter."""
        return bool(self._tied_sets)

    def tied(self) -> list[tuple[nn.Parameter, Any, bool]]:
        """Return this rank's tied parameters, each with its group and whether this stage is first.

        The group has the ranks of this column that hold the parameter. The call is collective."""
        groups: dict[tuple[int, ...], Any] = {}
        for held in self._tied_sets:
            for column in range(self.layout.dp):
                ranks = [stage * self.layout.dp + column for stage in held]
                group = dist.new_group(ranks)  # every rank takes part in making every group
                if self.rank in ranks:
                    groups[held] = group
        return [
            (p, groups[tuple(held)], held[0] == self.stage)
            for p, held in self._stages.items()
            if len(held) > 1 and p.requires_grad
        ]

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the stage's parameters by canonical name."""
        return {self._names[p]: p for p in module.parameters()}

    def own_tensors(
        self, named: Mapping[str, torch.Tensor], shared: bool
    ) -> dict[str, torch.Tensor]:
        """Return the live stage's tensors by canonical name.

        `named`: the tensors as the live module names them. `shared`: also return those that an
        earlier stage holds as well."""
        tensors: dict[str, torch.Tensor] = {}
        for long_name, tensor in named.items():
            name = long_name.partition(".")[2]  # the stage's number is in front
            if isinstance(tensor, nn.Parameter):
                name = self._names[tensor]
                if not shared and self._stages[tensor][0] != self.stage:
                    continue
            elif name in self._foreign and not shared:
                continue
            tensors[name] = tensor
        return tensors

    def live_layers(self, module: nn.Module) -> list[int]:
        """Return the layers whose parameters a live stage holds, and those without parameters."""
        live = {p for p in module.parameters() if p in self._names}
        held = {i for p in live for i in self._layers_of[self._names[p]]}
        return sorted(held | set(self._bare))

    def tied_digest(self) -> dict[str, str]:
        """Return the SHA-256 of each tied parameter's bits, by name."""
        tied = {p: self._names[p] for p, held in self._stages.items() if len(held) > 1}
        return {
            name: hashlib.sha256(
                p.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for p, name in tied.items()
        }

    @staticmethod
    def tied_agree(digests: Sequence[dict[str, str]]) -> bool:
        """Tell whether ranks that hold a tied parameter hold the same bits."""
        seen: dict[str, str] = {}
        return all(seen.setdefault(n, d) == d for digest in digests for n, d in digest.items())
