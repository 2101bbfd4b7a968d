"""This module computes the weights of attention by their formula, as torch's function does."""

import math

import torch


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Returns softmax(QK'), [..., queries, keys]; zeros for a query that no key is open to."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        size = scores.shape[-2:]
        mask = torch.ones(size, dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores.softmax(-1)
    is_bool = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, -math.inf) if is_bool else scores + mask
    closed = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(closed, 0.0).softmax(-1).masked_fill(closed, 0.0)
