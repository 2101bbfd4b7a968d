"""Code as users write it, which raises where a job asks for it. The tests look for its lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hybrid


class Layer(nn.Module):
    """A layer that raises in one way while it trains."""

    def __init__(self, inputs: int, outputs: int, raises: str = "") -> None:
        super().__init__()
        self.linear, self.raises = nn.Linear(inputs, outputs), raises

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.raises == "checkpoint" and self.training:
            return checkpoint(self.inner, x, use_reentrant=False)
        if self.raises == "shape" and torch.is_grad_enabled() and len(x) > 2:
            x = x @ torch.ones(3, 3)  # LINE shape
        y = torch.tanh(self.linear(x))
        if self.raises == "hook" and y.requires_grad:
            y.register_hook(self.hook)
        return y

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return x[{"a": 0}["b"]]  # type: ignore[index]  # LINE checkpoint

    def hook(self, gradient: torch.Tensor) -> None:
        raise ZeroDivisionError("of the hook")  # LINE hook


class Branch(nn.Module):
    """One of two layers, by what the micro-batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(11, 11), nn.Linear(11, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.a(x) if x.detach().sum() > 0 else self.b(x))


def loss_in_a_rank(output: torch.Tensor, target: torch.Tensor) -> Any:
    if torch.distributed.is_initialized() and torch.is_grad_enabled():
        raise ValueError("of a rank's loss")  # LINE rank
    return hybrid.cross_entropy(output, target)


def loss_that_raises(output: torch.Tensor, target: torch.Tensor) -> Any:
    if torch.is_grad_enabled() and len(output) > 2:
        raise ValueError("of the loss")  # LINE loss
    return hybrid.cross_entropy(output, target)


def model(raises: str = "") -> Any:
    if raises == "model":
        return {}["no such key"]  # LINE model
    if raises == "exit":
        raise SystemExit("usage: train.py")  # LINE exit
    middle = Branch() if raises == "branch" else Layer(11, 11, raises)
    losses = {"loss": loss_that_raises, "rank": loss_in_a_rank}
    loss = losses.get(raises, hybrid.cross_entropy)
    return [Layer(13, 11), middle, Layer(11, 11), nn.Linear(11, 4)], loss


class Samples(torch.utils.data.Dataset[Any]):
    """Samples of which one cannot be read."""

    def __init__(self, count: int, bad: int = -1) -> None:
        self.inputs = torch.randn(count, 13, generator=torch.Generator().manual_seed(count))
        self.bad = bad

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            raise OSError("no such picture")  # LINE data
        return self.inputs[index], index % 4


def data(bad: int = -1) -> Any:
    return Samples(50, bad), Samples(7)


def optimizer_step(parameter: torch.Tensor) -> None:
    F.relu(parameter, 1, 2, 3)  # type: ignore[call-arg]  # LINE optimizer
