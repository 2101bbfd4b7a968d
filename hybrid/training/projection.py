"""Projects each tensor of weights to one number, which shows how far apart two runs are."""

from collections.abc import Mapping

import torch

GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: fractions of its multiples fill (0, 1) evenly
IN_PLACE = {"nan": 1.0, "posinf": 2.0, "neginf": 3.0}  # of what is not finite, so that it shows
CHUNK = 2**16  # elements taken to float64 at a time


def project(state: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the dot product, in float64, of each floating-point tensor with fixed fractions.

    The projection is linear, so the ratio of two runs' changes shows by which factor a gradient or
    a learning rate was scaled."""
    return {name: _project(t) for name, t in state.items() if t.is_floating_point()}


def _project(tensor: torch.Tensor) -> float:
    flat, total = tensor.detach().flatten(), 0.0
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK].to("cpu", torch.float64)
        if not piece.isfinite().all():
            piece = piece.nan_to_num(**IN_PLACE)
        places = torch.arange(start, start + piece.numel(), dtype=torch.float64)
        # Only arithmetic: with torch.cos, one process in some hundreds (on two threads) got a first
        # projection that was 1e-8 off, from weights that were equal to the last bit.
        total += float(piece @ (torch.frac(places * GOLDEN) - 0.5))
    return total
