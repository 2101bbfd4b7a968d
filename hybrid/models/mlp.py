"""This module makes a multi-layer perceptron in which each layer holds one weight matrix.

An activation belongs to the linear layer before it, so that wherever the list is cut into stages,
each stage has parameters."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from .losses import Loss, cross_entropy

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "tanh": torch.tanh,
}


class Linear(nn.Linear):
    """Is torch's, drawn as torch does it, or else by Xavier's uniform with zero biases."""

    xavier = False

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        if not self.xavier:
            return super().reset_parameters()
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class Dense(Linear):
    """Applies a linear map and then an activation."""

    def __init__(self, in_features: int, out_features: int, activation: str) -> None:
        super().__init__(in_features, out_features)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, in_features] to [batch, out_features]."""
        return ACTIVATIONS[self.activation](super().forward(x))


def mlp(
    sizes: Sequence[int] = (784, 512, 256, 10),
    activation: str = "gelu",
    init: Literal["torch", "xavier"] = "torch",
) -> tuple[list[nn.Module], Loss]:
    """Makes layers sizes[0] -> ... -> sizes[-1], activated except for the last, and cross-entropy.

    `init` is torch's default for linear layers, or Xavier's uniform with zero biases (Glorot and
    Bengio 2010). Mind the kink of `activation` relu: where a unit's input is within rounding of
    zero, two equal runs can part for good (docs/how-equal-is-equal.md). Raises ValueError where an
    option is wrong."""
    if len(sizes) < 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"sizes = {list(sizes)}: two or more positive integers are needed")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: valid: {', '.join(ACTIVATIONS)}")
    if init not in ("torch", "xavier"):
        raise ValueError(f"init = {init!r}: valid: torch, xavier")
    hidden = itertools.pairwise(sizes[:-1])
    layers: list[Linear] = [Dense(a, b, activation) for a, b in hidden]
    layers.append(Linear(sizes[-2], sizes[-1]))
    for layer in layers if init == "xavier" else ():
        layer.xavier = True
        if not layer.weight.is_meta:
            layer.reset_parameters()
    return [*layers], cross_entropy
