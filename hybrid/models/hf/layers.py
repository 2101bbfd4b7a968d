"""This module makes layers of a causal language model of transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..cutting.calling import Arguments, Calling, logits_of
from ..cutting.layers import ModuleLayers
from ..cutting.plan import CutPlan


def _by_name(forward: Callable[..., Any], value: torch.Tensor) -> Arguments:
    return (), {"input_ids": value}


class HFLayers(ModuleLayers):
    """Takes token ids int64 [B, T] and returns logits [B, T, vocabulary]."""

    resets = False  # a family's code sets what it likes

    def __init__(self, model: nn.Module, plan: CutPlan) -> None:
        super().__init__(model, Calling(_by_name, logits_of), plan)
        self._names = [block.name for block in plan.blocks]  # no list but that of decoder layers

    def cut(self, samples: Sequence[Any] | None) -> None:
        """Does nothing: `probe` needs no data."""

    def draw(self, module: nn.Module) -> None:
        """Draws as the family does it, which may set what lies inside the module as well."""
        model: Any = self.model
        model._init_weights(module)

    def saved_names(self) -> dict[str, str]:
        """Names all tensors as transformers does, each once."""
        return {name: name for name in self.tensors()}
