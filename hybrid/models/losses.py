"""Losses given as (sum, count), so that a mean over unequal shares of a batch is exact."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | int]]
IGNORED_TARGET = -100  # torch's own default for targets that do not count


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of logits `output` [..., classes] against `target` int64 [...], summed in nats
    over the targets that are not -100, and how many these are. Computed in fp32 from logits of any
    dtype."""
    logits = output.reshape(-1, output.shape[-1]).float()
    total = functional.cross_entropy(
        logits, target.reshape(-1), ignore_index=IGNORED_TARGET, reduction="sum"
    )
    return total, (target != IGNORED_TARGET).sum()
