"""A Hugging Face causal language model as a list of layers, and the stages that are made of it.

A stage is the model itself, hollowed. Its decoder list keeps its full length, since many families
pick masks and layer types by index, but the layers of other stages lose their parameters and hand
on what they get. The family's own code makes masks, positions and rotary tables on every stage.
Where a stage begins, the tensor that it received takes the place of the hidden state; where it
ends, the forward is left, so that nothing behind it runs. Only one float tensor goes from stage to
stage; token ids, for the few families that need them again, travel inside it as digits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ..layers import Layers
from .probe import HFCutPlan, get_hidden, replace_hidden

BASE, DIGITS = 256, 3  # bf16 holds whole numbers up to 256; no vocabulary has 256**3 tokens


class Place(NamedTuple):
    """Where a parameter was that a stage does not need."""

    module: nn.Module
    name: str
    shape: torch.Size


class Holder(nn.Module):
    """An element that holds parameters outside the decoder list, and its decoder layer, if any."""

    def __init__(self, parameters: list[nn.Parameter], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.parameters_outside = nn.ParameterList(parameters)

    def release(self) -> None:
        """Hold nothing any more."""
        self.layer, self.parameters_outside = None, nn.ParameterList()


class HFLayers(Layers):
    """[what comes before the decoder layers, each decoder layer, what comes behind them].

    A model that cannot be cut is one layer. The whole model has the names of transformers.
    """

    def __init__(self, model: nn.Module, cut: HFCutPlan) -> None:
        self.model, self.cut, self.cut_problem = model, cut, cut.problem
        self._blocks = list(model.get_submodule(cut.path).children()) if cut.path else [model]
        super().__init__([model] if cut.problem else self._elements())
        self._sizes = super().sizes()

    def _elements(self) -> list[nn.Module]:
        """Frozen outside parameters, such as tables of sines, are in each element: no graph tells
        which use them. What is not used is in the first."""
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
        """See `Layers`: the decoder layers."""
        return self._blocks

    def modules(self) -> list[nn.Module]:
        """Every module of the whole model, each once."""
        return list(self.model.modules())

    def tensors(self) -> dict[str, torch.Tensor]:
        """See `Layers`."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def sizes(self) -> list[int]:
        """See `Layers`; still known once `join` took the elements apart."""
        return self._sizes

    def unit_classes(self) -> list[str]:
        """See `Layers`: of the decoder layers only, whether or not the model can be cut."""
        return Layers(self._blocks).unit_classes() if self.cut.path else []

    def join(self, part: range) -> nn.Module:
        """See `Layers`. The model becomes the stage: what the stage does not need is freed.

        Whole: token ids int64 [B, T] to logits [B, T, vocabulary]. A stage takes ids where it
        begins with the model and returns logits where it ends with it; between stages goes the
        hidden state. ValueError where the model cannot be cut.
        """
        whole = len(part) == len(self)
        if not whole:
            if self.cut_problem:
                raise ValueError(f"the model cannot be cut: {self.cut_problem}")
            absent = self._hollow(part)
        for element in self:
            if isinstance(element, Holder):
                element.release()
        stage: Any = _become(self.model, _Whole if whole else _Stage)
        if not whole:
            stage.begin(self.cut, part, part.stop == len(self), absent)
        return stage

    def _hollow(self, part: range) -> list[Place]:
        """Free what `part` does not need; the places outside the decoder list that miss it."""
        own = {m for i, x in enumerate(self._blocks, 1) if i in part for m in x.modules()}
        keep = {p for i in part for p in self[i].parameters()}
        for i, layer in enumerate(self._blocks, 1):
            if i not in part:
                _free_tensors(layer, keep, own)
                _become(layer, _Hollow).cut = self.cut
                layer._compiled_call_impl = None  # there is nothing left to compile
        return _take_out(self.model, keep)


def _free_tensors(layer: nn.Module, keep: set[nn.Parameter], own: set[nn.Module]) -> None:
    """Take a decoder layer's parameters and buffers, but for what modules of others share."""
    for module in layer.modules():
        if module in own:
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter not in keep:
                del module._parameters[name]
                module.__dict__[name] = torch.zeros(())  # some families rescale all layers
        for name in module._buffers:
            module._buffers[name] = None


def _take_out(model: nn.Module, keep: set[nn.Parameter]) -> list[Place]:
    absent = []
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter not in keep:
                del module._parameters[name]
                absent.append(Place(module, name, parameter.shape))
    return absent


def _become(module: nn.Module, kind: type[nn.Module]) -> Any:
    """The module itself, with the methods of `kind` before those of its class."""
    old = type(module)
    name = old.__name__ if kind is not _Hollow else kind.__name__.strip("_")
    module.__class__ = type(name, (kind, old), {"__module__": __name__})
    return module


class _Whole(nn.Module):
    """The whole model."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [B, T] to logits [B, T, vocabulary]."""
        return super().forward(input_ids=input_ids).logits


class _Hollow(nn.Module):
    """A decoder layer of another stage: hands on the hidden state."""

    cut: HFCutPlan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer would return, had it changed nothing."""
        hidden = get_hidden(args, kwargs, self.cut.hidden)
        count = self.cut.num_outputs
        return hidden if count is None else (hidden, *[None] * (count - 1))

    def __repr__(self) -> str:
        return "Hollow()"  # what a class prints of itself may need its parameters


class _Left(Exception):
    """The forward is left where the stage ends, with the hidden state there."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Stage(nn.Module):
    """Consecutive elements of a model, made of the whole by `HFLayers.join`."""

    def begin(self, cut: HFCutPlan, part: range, ends: bool, absent: list[Place]) -> None:
        """Hook the places where the stage begins and ends."""
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
        """Token ids or hidden state to hidden state or logits, see `HFLayers.join`."""
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
        """Zeros without memory in place of the parameters of others: code that runs before the
        stage's first layer may use them, but its hidden state is replaced."""
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
    """Hidden state [..., B, T, ..., D] with its token ids int64 [B, T] behind it, as digits:
    [..., B, T, ..., D + 3]. Whole numbers below 256 are exact in every float type."""
    digits = torch.stack([ids // BASE**i % BASE for i in range(DIGITS)], -1).to(hidden.dtype)
    between = hidden.dim() - batch_dim - 3
    digits = digits.reshape(*ids.shape, *[1] * between, DIGITS)
    return torch.cat([hidden, digits.expand(*hidden.shape[:-1], DIGITS)], -1)


def unpack_ids(packed: torch.Tensor, batch_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state and the token ids that `pack_ids` was given."""
    digits = packed[..., -DIGITS:].detach()
    while batch_dim:
        digits, batch_dim = digits[0], batch_dim - 1
    while digits.dim() > 3:
        digits = digits[:, :, 0]
    ids = torch.zeros(digits.shape[:2], dtype=torch.int64, device=packed.device)
    for i in range(DIGITS):
        ids += digits[..., i].to(torch.int64) * BASE**i
    return packed[..., :-DIGITS].contiguous(), ids
