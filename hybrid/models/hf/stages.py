"""This module makes layers, and stages of them, of a causal language model of transformers.

A stage is the model itself without what it does not need. Its decoder list keeps its full length,
since many families pick masks and layer types by index, but the layers of other stages lose their
parameters and return the hidden state unchanged. The family's own code makes masks, positions and
rotary tables on every stage. Where a stage begins, the received tensor replaces the hidden state.
Where it ends, an exception leaves the forward pass, so that nothing behind it runs. Only one float
tensor goes from stage to stage. The few families that need token ids again get them inside that
tensor, as digits."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers import Layers, unshared
from .probe import HFCutPlan, get_hidden, replace_hidden

BASE, DIGITS = 256, 3  # bf16 is exact for whole numbers up to 256; no vocabulary has 256**3 tokens


class Place(NamedTuple):
    """Tells where a parameter was that a stage does not need."""

    module: nn.Module
    name: str
    shape: torch.Size


class Holder(nn.Module):
    """Holds an element's parameters outside the decoder list, and its decoder layer, if any."""

    def __init__(self, parameters: list[nn.Parameter], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.parameters_outside = nn.ParameterList(parameters)


class HFLayers(Layers):
    """Lists as elements what comes before the decoder layers, each of them, and what follows them.

    A model that cannot be cut is one element. The whole model has the names of transformers."""

    def __init__(self, model: nn.Module, cut: HFCutPlan) -> None:
        self.model, self.cut, self.cut_problem = model, cut, cut.problem
        self._blocks = list(model.get_submodule(cut.path).children()) if cut.path else [model]
        super().__init__([model] if cut.problem else self._elements())
        self._sizes = super().sizes()

    def _elements(self) -> list[nn.Module]:
        """Makes the elements, each with the parameters outside the decoder list that it uses.

        Frozen ones, such as tables of sines, are in each element, since no graph tells which use
        them. Unused ones are in the first."""
        named = dict(self.model.named_parameters())
        inside = {p for x in self._blocks for p in x.parameters()}
        unused = [named[name] for name in self.cut.unused if named[name] not in inside]
        frozen = [p for p in named.values() if not p.requires_grad and p not in inside]
        frozen = [p for p in frozen if all(p is not q for q in unused)]
        used = [[*(named[name] for name in names), *frozen] for names in self.cut.used]
        layers = zip(self._blocks, used[1:-1], strict=True)
        return [
            Holder(used[0] + unused),
            *[Holder(outside, layer) if outside else layer for layer, outside in layers],
            Holder(used[-1]),
        ]

    def blocks(self) -> list[nn.Module]:
        """Lists the decoder layers."""
        return self._blocks

    def modules(self) -> list[nn.Module]:
        """Does what `Layers` promises."""
        return list(self.model.modules())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Does what `Layers` promises."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def sizes(self) -> list[int]:
        """Does what `Layers` promises, also after `join` took the elements apart."""
        return self._sizes

    def units(self) -> list[nn.Module]:
        """Lists decoder layers alone, whether or not the model can be cut."""
        return unshared(self._blocks, [self.model]) if self.cut.path else []

    def join(self, part: range) -> nn.Module:
        """Turns the model into a stage, as `Layers` promises, and frees what that does not need.

        The whole model maps token ids int64 [B, T] to logits [B, T, vocabulary]. The first stage
        takes the ids, the last returns the logits, and the hidden state goes from stage to stage.
        Raises ValueError where the model cannot be cut."""
        whole = len(part) == len(self)
        if self.cut_problem and not whole:
            raise ValueError(f"the model cannot be cut: {self.cut_problem}")
        absent = [] if whole else self._hollow(part)
        for element in self:
            if isinstance(element, Holder):  # the stage holds what it needs, and nothing twice
                element.layer, element.parameters_outside = None, nn.ParameterList()
        stage: Any = _become(self.model, _Whole if whole else _Stage)
        if not whole:
            stage.begin(self.cut, part, part.stop == len(self), absent)
        return stage

    def _hollow(self, part: range) -> list[Place]:
        """Frees what `part` does not need, and returns where that was outside the decoder list."""
        own = {m for i, x in enumerate(self._blocks, 1) if i in part for m in x.modules()}
        keep = {p for i in part for p in self[i].parameters()}
        for i, layer in enumerate(self._blocks, 1):
            if i not in part:
                others = [m for m in layer.modules() if m not in own]  # `part` may share modules
                for module, name, _ in _take_out(others, keep):
                    module.__dict__[name] = torch.zeros(())  # some families rescale all layers
                for module in others:
                    module._buffers.update(dict.fromkeys(module._buffers))
                _become(layer, _Hollow).cut = self.cut
                layer._compiled_call_impl = None  # there is nothing left to compile
        return _take_out(self.model.modules(), keep)


def _take_out(modules: Iterable[nn.Module], keep: set[nn.Parameter]) -> list[Place]:
    """Removes all parameters that are not in `keep` from modules, and returns where they were."""
    absent = []
    for module in modules:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter not in keep:
                del module._parameters[name]
                absent.append(Place(module, name, parameter.shape))
    return absent


def _become(module: nn.Module, kind: type[nn.Module]) -> Any:
    """Puts the methods of `kind` before those of the module's own class; returns the module."""
    old = type(module)
    name = old.__name__ if kind is not _Hollow else kind.__name__.strip("_")
    module.__class__ = type(name, (kind, old), {"__module__": __name__})
    return module


class _Whole(nn.Module):
    """Is mixed into the class of a whole model."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Maps token ids int64 [B, T] to logits [B, T, vocabulary]."""
        return super().forward(input_ids=input_ids).logits


class _Hollow(nn.Module):
    """Is mixed into a decoder layer of another stage, which then returns the hidden state as is."""

    cut: HFCutPlan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the layer would return if it changed nothing."""
        hidden = get_hidden(args, kwargs, self.cut.hidden)
        count = self.cut.num_outputs
        return hidden if count is None else (hidden, *[None] * (count - 1))

    def __repr__(self) -> str:
        return "Hollow()"  # the class's own method may need its parameters


class _Left(Exception):
    """Leaves the forward pass where the stage ends, with the hidden state there."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Stage(nn.Module):
    """Is mixed into a model by `HFLayers.join`, which then runs consecutive elements of it."""

    def begin(self, cut: HFCutPlan, part: range, ends: bool, absent: list[Place]) -> None:
        """Puts hooks where the stage begins and ends."""
        self.cut, self.part, self.ends, self.absent = cut, part, ends, absent
        self.received: torch.Tensor | None = None
        self.filled: tuple[torch.dtype, torch.device] | None = None
        layers = list(self.get_submodule(cut.path).children())
        if 0 < part.start <= len(layers):
            layers[part.start - 1].register_forward_pre_hook(self._enter, with_kwargs=True)
        elif part.start:
            layers[-1].register_forward_hook(self._enter_behind)
        if part.stop <= len(layers):
            layers[part.stop - 1].register_forward_pre_hook(self._leave, with_kwargs=True)
        elif not ends:
            layers[-1].register_forward_hook(self._leave_behind)

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        """Maps token ids or hidden state to hidden state or logits, see `HFLayers.join`."""
        if self.part.start == 0:
            ids = received
        elif self.cut.carries_ids:
            self.received, ids = unpack_ids(received, self.cut.batch_dim)
        else:
            rows, tokens = received.shape[self.cut.batch_dim :][:2]
            self.received = received
            ids = torch.zeros(rows, tokens, dtype=torch.int64, device=received.device)
        self._stand_in(received)
        try:
            logits = super().forward(input_ids=ids).logits
        except _Left as left:
            hidden, logits = left.hidden, None
        if self.received is not None or (logits is None) == self.ends:
            raise RuntimeError("the forward skipped a decoder layer where its stage begins or ends")
        if logits is not None:
            return logits
        return pack_ids(hidden, ids, self.cut.batch_dim) if self.cut.carries_ids else hidden

    def _stand_in(self, received: torch.Tensor) -> None:
        """Puts zeros that take no memory in place of the parameters of other stages.

        Code before the stage's first layer may use them, but its hidden state is replaced."""
        own = next((p for p in self.parameters() if p.is_floating_point()), received)
        if self.filled == (own.dtype, own.device):
            return
        zero = torch.zeros((), dtype=own.dtype, device=own.device)
        for place in self.absent:
            place.module.__dict__[place.name] = zero.expand(place.shape)
        self.filled = own.dtype, own.device

    def _take_received(self) -> torch.Tensor:
        received, self.received = self.received, None
        assert received is not None
        return received

    def _enter(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return replace_hidden(args, kwargs, self.cut.hidden, self._take_received())

    def _enter_behind(self, layer: nn.Module, args: Any, output: Any) -> Any:
        hidden = self._take_received()
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _leave(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Left(get_hidden(args, kwargs, self.cut.hidden))

    def _leave_behind(self, layer: nn.Module, args: Any, output: Any) -> None:
        raise _Left(output[0] if isinstance(output, (tuple, list)) else output)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(elements {self.part.start} to {self.part.stop - 1})"


def pack_ids(hidden: torch.Tensor, ids: torch.Tensor, batch_dim: int) -> torch.Tensor:
    """Appends token ids int64 [B, T] to a hidden state [..., B, T, ..., D] as three digits.

    The result is [..., B, T, ..., D + 3]. Whole numbers below 256 are exact in every float type."""
    digits = torch.stack([ids // BASE**i % BASE for i in range(DIGITS)], -1).to(hidden.dtype)
    between = hidden.dim() - batch_dim - 3
    digits = digits.reshape(*ids.shape, *[1] * between, DIGITS)
    return torch.cat([hidden, digits.expand(*hidden.shape[:-1], DIGITS)], -1)


def unpack_ids(packed: torch.Tensor, batch_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the hidden state and the token ids that `pack_ids` was given."""
    digits = packed[..., -DIGITS:].detach()[(0,) * batch_dim]
    while digits.dim() > 3:
        digits = digits[:, :, 0]
    ids: Any = sum(digits[..., i].to(torch.int64) * BASE**i for i in range(DIGITS))
    return packed[..., :-DIGITS].contiguous(), ids
