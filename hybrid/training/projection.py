"""Weights as one number a tensor, which shows how far two runs are apart without their tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: fractions of its multiples fill (0, 1) evenly
CHUNK = 2**16  # elements taken to float64 at a time


def project(state: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """One number a tensor: its dot product, in float64, with a fixed sequence of fractions. Linear,
    so that the ratio of two runs' changes shows by what a gradient or a rate was scaled."""
    return {name: _project(t) for name, t in state.items() if t.is_floating_point()}


def _project(tensor: torch.Tensor) -> float:
    flat, total = tensor.detach().flatten(), 0.0
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK].to("cpu", torch.float64)
        places = torch.arange(start, start + piece.numel(), dtype=torch.float64)
        # Arithmetic alone. By torch.cos one process of some hundreds, on two threads, had its first
        # projection 1e-8 off, of the same weights to the last bit.
        total += float(piece @ (torch.frac(places * GOLDEN) - 0.5))
    return total
