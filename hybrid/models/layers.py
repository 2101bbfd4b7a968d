"""This module defines what a model is to the engines: a list of layers, joined to modules."""

from collections import Counter, OrderedDict
from collections.abc import Iterable

import torch
from torch import nn


class Layers(list[nn.Module]):
    """Holds layers in order, each of which takes what the one before returned.

    Layers may share parameters: an `nn.Parameter` that two of them hold is tied, wherever they run.
    A model whose forward pass is not a plain chain (`hybrid.models.hf`) overrides `join`."""

    cut_problem: str | None = None  # says why, if the model cannot be cut into stages

    def join(self, part: range) -> nn.Module:
        """Makes one module of the layers in `part`; call it once, since it may take them apart.

        Parameters keep the names that they have in the whole model, `join(range(len(self)))`. These
        are the canonical names of weights everywhere. A tied parameter has the name that its first
        layer there gives it."""
        return nn.Sequential(OrderedDict((str(i), self[i]) for i in part))

    def whole(self) -> nn.Module:
        """Makes one module of the whole model."""
        return self.join(range(len(self)))

    def blocks(self) -> list[nn.Module]:
        """Lists the modules that are compiled or recomputed one by one, in the order they run."""
        return list(self)

    def modules(self) -> list[nn.Module]:
        """Lists every module of the whole model, each once."""
        return list(dict.fromkeys(m for layer in self for m in layer.modules()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns each parameter and buffer of the whole model once, by its canonical name."""
        found: dict[str, torch.Tensor] = {}
        seen: set[torch.Tensor] = set()
        for i, layer in enumerate(self):
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if tensor not in seen:
                    seen.add(tensor)
                    found[f"{i}.{name}"] = tensor
        return found

    def names(self) -> dict[nn.Parameter, str]:
        """Returns the canonical name of each parameter of the whole model."""
        return {t: name for name, t in self.tensors().items() if isinstance(t, nn.Parameter)}

    def sizes(self) -> list[int]:
        """Counts each layer's trainable parameters, a tied one in each layer that holds it."""
        return [sum(p.numel() for p in x.parameters() if p.requires_grad) for x in self]

    def units(self) -> list[nn.Module]:
        """Lists the modules that are sharded one by one, as objects.

        Each has parameters, and shares none with anything outside itself."""
        return unshared(self, self)


def unshared(candidates: Iterable[nn.Module], roots: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the candidates with parameters of which no place in `roots` is outside themselves."""
    places: Counter[nn.Parameter] = Counter()
    for root in roots:
        places += _places(root)
    own = [(candidate, _places(candidate)) for candidate in candidates]
    return [c for c, held in own if held and all(places[p] == n for p, n in held.items())]


def _places(module: nn.Module) -> Counter[nn.Parameter]:
    """Counts the places of each parameter in a module, also those in modules that occur twice."""
    return Counter(p for _, p in module.named_parameters(remove_duplicate=False))


def holders_of(layers: Iterable[nn.Module]) -> dict[nn.Parameter, list[int]]:
    """Returns for each parameter the indices of the layers that hold it, in order."""
    holders: dict[nn.Parameter, list[int]] = {}
    for i, layer in enumerate(layers):
        for parameter in layer.parameters():
            holders.setdefault(parameter, []).append(i)
    return holders
