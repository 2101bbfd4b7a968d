"""Models with tied weights and buffers, by name and of a user's code, whose weights are taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrid.models.losses import Loss, cross_entropy
from tests.conftest import small_job

ME = "tests.tied_models"
GPT = {
    "num_layers": 2,
    "width": 24,
    "num_heads": 3,
    "context": 16,
    "vocab_size": 257,
    "tied": True,
}
RAN: list[str] = []


class Own(nn.Module):
    """A module of a user's: a tied weight, a buffer to keep, one that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)
        self.again = nn.Linear(32, 32, bias=False)
        self.again.weight = self.inner.weight
        self.head = nn.Linear(32, 10)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("made", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, 10] of x [B, 32]."""
        return self.head(torch.tanh(self.again(torch.tanh(self.inner(x)))) * self.kept[0])


def own() -> tuple[nn.Module, Loss]:
    """The module, and that this code ran."""
    RAN.append("model")
    return Own(), cross_entropy


def listed() -> tuple[list[nn.Module], Loss]:
    """Layers in a list, two of which are tied, with buffers that are kept and one that is not."""
    first, last = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    last.weight = first.weight
    first.register_buffer("made", torch.ones(2), persistent=False)
    return [first, nn.BatchNorm1d(32), last], cross_entropy


def own_job(**changes: Any) -> Any:
    """The small job with the module above."""
    return small_job(model={"name": f"{ME}:own"}, **changes)
