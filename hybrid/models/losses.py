"""This module gives losses as (sum, count), which makes means over unequal shares exact."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..data.targets import IGNORED_TARGET

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | int]]


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the cross-entropy in nats, summed over targets other than -100, and their count.

    `output`: logits [..., classes] of any dtype. `target`: int64 [...]. The sum is in fp32."""
    logits, classes = output.float(), target
    if output.dim() > 2:
        logits, classes = logits.reshape(-1, output.shape[-1]), target.reshape(-1)
    total = functional.cross_entropy(logits, classes, ignore_index=IGNORED_TARGET, reduction="sum")
    return total, (target != IGNORED_TARGET).sum()


def as_loss(given: Any) -> Loss:
    """Returns a loss as `(output, target) -> (sum, count)`; raises ValueError for another thing."""
    if type(given) is nn.CrossEntropyLoss:

        def summed(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total = functional.cross_entropy(output.float(), target, reduction="sum")
            return total, (target != IGNORED_TARGET).sum()

        return summed
    if not callable(given):
        raise ValueError(f"the loss is a {type(given).__name__}, which cannot be called")
    return given
