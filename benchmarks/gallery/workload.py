"""The model of the gallery's jobs: a small perceptron, with what some failures need to show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hybrid.models.losses import Loss, cross_entropy
from hybrid.models.mlp import mlp


def perceptron(
    sizes: Sequence[int], loss_scale: float = 1.0, rounded: bool = False
) -> tuple[list[nn.Module], Loss]:
    """Make layers sizes[0] -> ... -> sizes[-1] with tanh between them, and cross-entropy.

    loss_scale: multiplies the loss, and so the gradient norm. rounded: the weights begin as numbers
    that bf16 holds, so that an engine whose master weights begin as the rounded ones begins alike.
    """
    layers, loss = mlp(sizes, "tanh")
    if rounded:
        with torch.no_grad():
            for parameter in nn.ModuleList(layers).parameters():
                parameter.copy_(parameter.bfloat16())

    def scaled(
        output: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        total, count = loss(output, target)
        return total * loss_scale, count

    return layers, cross_entropy if loss_scale == 1.0 else scaled
