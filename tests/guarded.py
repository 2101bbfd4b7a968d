"""Models and data for `[guard]`: one sample makes a layer, the loss or a gradient go wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrid.engines import guard
from tests.workloads import Points, squared_error

LIMIT = 1e4  # of a number in a layer, above which a gradient is not finite
LARGE = {
    "nan": float("nan"),
    "layer": 1e25,
    "loss": 1e21,
    "gradient": 1e8,
    "spike": 1e3,
}  # what the sample is times


class Squared(nn.Module):
    """A layer that overflows to infinity where its input is over 1e19."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to [batch, width]."""
        return x + 1e-6 * torch.where(x.abs() > 1e23, x * x, 0 * x)


class _Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        steep = (x.abs() > ctx.limit) & (x.abs() < 1e12)
        return torch.where(steep, torch.nan, gradients[0]), None


class Steep(nn.Module):
    """A layer that is the identity, and whose gradient is NaN where its input is over `limit`."""

    def __init__(self, limit: float = LIMIT) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to [batch, width]."""
        out: torch.Tensor = _Steep.apply(x, self.limit)  # type: ignore[no-untyped-call]
        return out


class Residual(nn.Module):
    """A layer of a few operations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to [batch, width]."""
        return x + torch.tanh(self.inner(x))


def brittle(
    norm: bool = False, dropout: float = 0.0, alone: bool = False
) -> tuple[list[nn.Module], object]:
    """Layers 0 to 7, two for each of four stages: 12 numbers in, 3 out.

    Layer 1 is `Steep`, layer 3 is `Squared`. norm: layer 5 is a batch norm, with running
    statistics. alone: a fault is planted, each rank's guard looks at its own numbers alone."""
    if alone:
        guard.gather_rows = lambda row: [row]
    between = nn.BatchNorm1d(20) if norm else nn.Identity()
    first = [nn.Linear(12, 20), Steep(), Residual(20), Squared(), nn.Linear(20, 20), between]
    return [*first, nn.Dropout(dropout), nn.Linear(20, 3)], squared_error


def marked(bad: list[int], kind: str, size: int = 61) -> tuple[Points, Points]:
    """`size` points, of which some are large, so that steps with them go wrong."""
    train = Points(size, 1)
    for i in bad:
        train.points[i] *= LARGE[kind]
    return train, Points(31, 2)
