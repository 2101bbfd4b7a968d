"""This module defines what a model is to the engines: a list of layers, joined to modules."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

RESETS = ("reset_parameters", "_reset_parameters")  # torch's modules have the one or the other


class FirstValues(Protocol):
    """Gives the parameters of a model that was made without values their first ones."""

    def fill(self, parameters: Iterable[torch.Tensor]) -> None:
        """Gives these their values, and others that get them together with these."""

    def close(self) -> None:
        """Closes what the values come from."""


class Layers(list[nn.Module]):
    """Holds layers in order, each of which takes what the one before returned.

    Layers may share parameters: an `nn.Parameter` that two of them hold is tied, wherever they run.
    A model whose forward pass is not a plain chain (`hybrid.models.cutting`) overrides `join`.
    keys: the layers' names, by default their numbers."""

    cut_problem: str | None = None  # says why, if the model cannot be cut into stages
    feeds_all_stages = False  # each stage takes the input of a micro-batch, not the first alone
    weights_from: dict[str, Any] | None = None  # where they came from, if not from the seed
    first_values: FirstValues | None = None  # of a model that was made without values
    saved_in: Path | None = None  # the folder of its own whose weights these are to be
    resets = True  # `draw` is all by which its code sets parameters, or else that is refused
    input_dtype: torch.dtype | None = None  # of a module's floating inputs, where not their own

    def __init__(self, layers: Iterable[nn.Module] = (), keys: Sequence[str] = ()) -> None:
        super().__init__(layers)
        self.keys = list(keys) or [str(i) for i in range(len(self))]
        self.is_module = bool(keys)  # a user brought an `nn.Sequential`

    def cut(self, samples: Sequence[Any] | None) -> None:
        """Finds where the model can be cut into stages; a chain can be cut anywhere.

        samples: the train set, or None where there is none."""

    def join(self, part: range) -> nn.Module:
        """Makes one module of the layers in `part`; call it once, since it may take them apart.

        Parameters keep the names that they have in the whole model, `join(range(len(self)))`. These
        are the canonical names of weights everywhere. A tied parameter has the name that its first
        layer there gives it."""
        return nn.Sequential(OrderedDict((self.keys[i], self[i]) for i in part))

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
                    found[f"{self.keys[i]}.{name}"] = tensor
        return found

    def buffer_owners(self) -> dict[str, int]:
        """Returns the layer that keeps a buffer, for buffers that several stages may hold."""
        return {}

    def saved_names(self) -> dict[str, str]:
        """Returns the canonical name of each tensor that final weights hold, by its name there.

        These are the names of the `state_dict` of a module that a user brought, which gives a tied
        parameter every name that it has, and leaves out buffers that are not persistent."""
        names = {id(t): name for name, t in self.tensors().items()}
        if not self.is_module:
            return {name: name for name in names.values()}
        saved = self.whole().state_dict(keep_vars=True).items()
        return {name: names[id(t)] for name, t in saved if id(t) in names}

    def names(self) -> dict[nn.Parameter, str]:
        """Returns the canonical name of each parameter of the whole model."""
        return {t: name for name, t in self.tensors().items() if isinstance(t, nn.Parameter)}

    def sizes(self) -> list[int]:
        """Counts each layer's trainable parameters, a tied one in each layer that holds it."""
        return [sum(p.numel() for p in x.parameters() if p.requires_grad) for x in self]

    def parts(self) -> list[list[nn.Module]]:
        """Lists what gets its first values together: modules, each after those inside it."""
        return [children_first(layer) for layer in self]

    def draw(self, module: nn.Module) -> None:
        """Has a module draw the first values of its own parameters."""
        reset(module)

    def fill(self, module: nn.Module) -> None:
        """Gives the parameters of a module their first values, where they were made without."""
        self.fill_parameters(module.parameters())

    def fill_parameters(self, parameters: Iterable[torch.Tensor]) -> None:
        """Gives parameters their first values, and others that get them together with these."""
        if self.first_values is not None:
            self.first_values.fill(parameters)

    def units(self) -> list[nn.Module]:
        """Lists the modules that are sharded one by one, none of which lies in another.

        Each has parameters, and shares none with anything outside itself."""
        return unshared(self, self)


def children_first(module: nn.Module) -> list[nn.Module]:
    """Lists a module and those inside it, each once, after those inside itself."""
    found: dict[nn.Module, None] = {}
    for child in module.children():
        found |= dict.fromkeys(children_first(child))
    return [*found, module]


def reset(module: nn.Module) -> None:
    """Has a module of torch, or one written like them, draw its own parameters.

    torch's have a method for that (https://docs.pytorch.org/docs/stable/meta.html)."""
    for name in RESETS:
        if callable(found := getattr(module, name, None)):
            found()
            return


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
