"""A user's own model and data, named by import path in the tests' jobs."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A residual layer of a user's own making, with a buffer and a parameter used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to [batch, width]."""
        return x + self.scale * self.second(torch.tanh(self.first(x) * self.scale + self.shift))


def squared_error(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Summed over every element, counted by elements."""
    return ((output - target) ** 2).sum(), target.numel()


def regression() -> tuple[list[nn.Module], object]:
    """Five layers, 12 numbers in, 3 out."""
    return [nn.Linear(12, 20), Block(20), Block(20), nn.Tanh(), nn.Linear(20, 3)], squared_error


class Points:
    """A map-style data set: points and a smooth function of them."""

    def __init__(self, size: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.points = torch.randn(size, 12, generator=draw)
        self.values = torch.sin(self.points[:, :3]) + 0.1 * torch.randn(size, 3, generator=draw)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.points[i], self.values[i]


def points(size: int = 60) -> tuple[Points, Points]:
    """`size` points to train on and 31 to test on, which divides by nothing."""
    return Points(size, 1), Points(31, 2)


class Sentences:
    """A map-style data set of token sequences with their next tokens; the last few do not count."""

    def __init__(self, size: int, tokens: int, vocab_size: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        starts = torch.randint(vocab_size, (size, 1), generator=draw)
        steps = torch.randint(1, 4, (size, tokens), generator=draw)
        self.ids = (torch.cat((starts, steps), 1).cumsum(1)) % vocab_size

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        target = self.ids[i, 1:].clone()
        target[len(target) - i % 3 :] = -100  # samples differ in how many targets they count
        return self.ids[i, :-1], target


def sentences(
    size: int = 60, tokens: int = 16, vocab_size: int = 61
) -> tuple[Sentences, Sentences]:
    """`size` sequences to train on and 13 to test on."""
    return Sentences(size, tokens, vocab_size, 1), Sentences(13, tokens, vocab_size, 2)


class Matrix(nn.Module):
    """One matrix, and nothing else."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, columns] to [batch, rows]."""
        return torch.tanh(x @ self.weight.T)


def matrices() -> tuple[list[nn.Module], object]:
    """Three matrices, 32 numbers in, 10 out."""
    return [Matrix(17, 32), Matrix(17, 17), Matrix(10, 17)], squared_error


class Gain(nn.Module):
    """A gain of one element, and a frozen shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 1.1))
        self.shift = nn.Parameter(torch.linspace(-0.1, 0.1, width), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to itself."""
        return torch.tanh(x * self.gain + self.shift)


class Tied(nn.Module):
    """A layer that shares its weight with another one."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to itself."""
        return x @ self.weight


def partly_frozen() -> tuple[list[nn.Module], object]:
    """Seven layers, 12 numbers in, 3 out: with frozen, tiny and tied tensors."""
    tied = nn.Parameter(torch.randn(7, 7) * 0.3)
    first, last = nn.Linear(12, 7), nn.Linear(7, 3)
    return [first, Gain(7), Tied(tied), Gain(7), Tied(tied), nn.Linear(7, 7), last], squared_error


def odd(shape: list[int], trained: bool = True) -> tuple[list[nn.Module], object]:
    """A parameter of any shape beside 12 numbers in and 3 out."""
    layers = [nn.Linear(12, 7), nn.Linear(7, 7), nn.Linear(7, 3)]
    layers[1].register_parameter("odd", nn.Parameter(torch.ones(shape), requires_grad=trained))
    return list(layers), squared_error


class Scalar(nn.Module):
    """A gain without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to itself."""
        return torch.tanh(x * self.gain)


def strided() -> tuple[list[nn.Module], object]:
    """12 numbers in, 3 out: a weight that is stored by columns, and a gain without axes."""
    first = nn.Linear(12, 7)
    first.weight = nn.Parameter(torch.randn(12, 7).mul_(0.3).T)
    return [first, Scalar(), nn.Linear(7, 3)], squared_error
