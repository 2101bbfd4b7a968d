"""What a model is to the engines: a flat list of layers, a run of which makes one module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn


class Layers(list[nn.Module]):
    """Layers in order, each taking what the one before returned.

    Layers may share parameters: the same `nn.Parameter` in two of them is tied, wherever they run.
    A model whose forward is no plain chain (`hybrid.models.hf`) overrides `join`.
    """

    cut_problem: str | None = None  # why the model cannot be cut into stages, where it cannot

    def join(self, part: range) -> nn.Module:
        """One module that runs the layers of `part`; called once, since it may take them apart.

        Its parameters have the names that they have in the whole model, `join(range(len(self)))`:
        these are the canonical names of weights everywhere. A tied parameter has the name of its
        first layer there.
        """
        return nn.Sequential(OrderedDict((str(i), self[i]) for i in part))

    def whole(self) -> nn.Module:
        """The whole model as one module."""
        return self.join(range(len(self)))

    def blocks(self) -> list[nn.Module]:
        """The modules that are run one after another, to be compiled or recomputed one by one."""
        return list(self)

    def modules(self) -> list[nn.Module]:
        """Every module of the whole model, each once."""
        return list(dict.fromkeys(m for layer in self for m in layer.modules()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer of the whole model by canonical name, each once."""
        found: dict[str, torch.Tensor] = {}
        seen: set[torch.Tensor] = set()
        for i, layer in enumerate(self):
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if tensor not in seen:
                    seen.add(tensor)
                    found[f"{i}.{name}"] = tensor
        return found

    def names(self) -> dict[nn.Parameter, str]:
        """The canonical name of each parameter of the whole model."""
        return {t: name for name, t in self.tensors().items() if isinstance(t, nn.Parameter)}

    def sizes(self) -> list[int]:
        """Trainable parameters of each layer, a tied one counted in each layer that holds it."""
        return [sum(p.numel() for p in x.parameters() if p.requires_grad) for x in self]

    def unit_classes(self) -> list[str]:
        """Names of the classes of layers that may be sharded one by one: those with parameters,
        none of which another layer shares."""
        holders = holders_of(self)
        tied = {type(self[i]).__name__ for held in holders.values() if len(held) > 1 for i in held}
        classes = {type(x).__name__ for x in self if any(True for _ in x.parameters())}
        return sorted(classes - tied)


def holders_of(layers: Iterable[nn.Module]) -> dict[nn.Parameter, list[int]]:
    """Every parameter with the indices of the layers that hold it, in order."""
    holders: dict[nn.Parameter, list[int]] = {}
    for i, layer in enumerate(layers):
        for parameter in layer.parameters():
            holders.setdefault(parameter, []).append(i)
    return holders
