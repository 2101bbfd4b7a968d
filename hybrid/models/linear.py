"""One linear layer, 784 -> 10 unless told otherwise: the smallest model there is to train."""

from __future__ import annotations

from torch import nn

from .losses import Loss, cross_entropy


def linear(in_features: int = 784, out_features: int = 10) -> tuple[list[nn.Module], Loss]:
    """One layer from [batch, in_features] to logits [batch, out_features], cross-entropy."""
    return [nn.Linear(in_features, out_features)], cross_entropy
