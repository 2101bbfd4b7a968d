"""This module gives losses as (sum, count), which makes means over unequal shares exact."""

from collections.abc import Callable

import torch
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
