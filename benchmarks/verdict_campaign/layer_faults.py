"""Plants faults in the layers of a model: in what one takes, in its gradients, in its start.

A layer is changed after the model is built and before an engine takes it, so that this works alike
under every strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from hybrid.models.layers import Layers
from hybrid.training import beginning

from .plant import Plant

Change = Callable[[torch.Tensor], torch.Tensor]


class _Scale(torch.autograd.Function):
    """Returns a tensor as it is, and scales its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.factor, None


def scale_output(
    plant: Plant, everywhere: bool = False, tensor: bool = False, last_micro_batch: bool = False
) -> None:
    """Scale gradients: of the loss on every rank, or on one rank to zero.

    There it is those of one tensor, or of all that the last micro-batch gives."""
    if tensor:
        _on_layers(lambda layers: _lose_gradient(plant, layers))
        return

    def scaled(x: torch.Tensor) -> torch.Tensor:
        if everywhere:
            return _Scale.apply(x, plant.fault.size)
        if last_micro_batch and plant.is_here() and plant.calls == plant.num_micro_batches():
            return _Scale.apply(x, 0.0)
        return x

    change_layers(plant, -1, output=scaled)


def change_layers(
    plant: Plant, index: int, inputs: Change | None = None, output: Change | None = None
) -> None:
    """Change what the layer `index` takes on the wrong rank, or what it returns on any rank.
    That is in training steps in which the fault acts."""

    def change(layers: Layers) -> None:
        layer = layers[index]
        original = layer.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not (plant.acts() and torch.is_grad_enabled()):
                return original(x)
            plant.calls += 1
            x = inputs(x) if inputs and plant.is_here() else x
            return output(original(x)) if output else original(x)

        layer.forward = forward

    _on_layers(change)


def start_apart(plant: Plant) -> None:
    """Scale the start of one tensor that is not zero by `1 + size`, on every rank."""

    def change(layers: Layers) -> None:
        found = [p for p in layers.names() if bool((p != 0).any())]
        with torch.no_grad():
            found[plant.fault.tensor % len(found)].mul_(1 + plant.fault.size)

    _on_layers(change)


def _on_layers(change: Callable[[Layers], None]) -> None:
    build = beginning.build_shared

    def changed(*arguments: Any) -> Any:
        layers, loss = build(*arguments)
        change(layers)
        return layers, loss

    beginning.build_shared = changed


def _lose_gradient(plant: Plant, layers: Layers) -> None:
    """Give one tensor a gradient of zero on the wrong rank: it is computed and not added."""
    names = list(layers.names().values())
    path, _, name = names[plant.fault.tensor % len(names)].rpartition(".")
    place, _, inner = path.partition(".")
    owner = layers[int(place)].get_submodule(inner)
    original = owner.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not (plant.acts() and plant.is_here() and torch.is_grad_enabled()):
            return original(x)
        with _replaced(owner, name, lambda p: _Scale.apply(p, 0.0)):
            return original(x)

    owner.forward = forward


@contextlib.contextmanager
def _replaced(owner: nn.Module, name: str, change: Change) -> Iterator[None]:
    """Let a module use another tensor for one of its parameters while the context lasts.

    A module reads its parameters as attributes. One that rounds at use has a property there."""
    if parametrize.is_parametrized(owner, name):
        rounding = owner.parametrizations[name]  # type: ignore[index]
        inside = rounding.forward
        rounding.forward = lambda: change(inside())
        try:
            yield
        finally:
            del rounding.forward
        return
    owner.__dict__[name] = change(getattr(owner, name))
    try:
        yield
    finally:
        del owner.__dict__[name]
