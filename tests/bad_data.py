"""Data sets that people bring which cannot be trained, or not be compared, by kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WIDTH, CLASSES = 16, 4


class Samples:
    """A map-style set of 48 samples, made by a function of their index."""

    def __init__(self, make: Callable[[int, torch.Tensor], Any]) -> None:
        self.make = make
        self.x = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.make(i, self.x[i])


def both(make: Callable[[int, torch.Tensor], Any]) -> Any:
    return Samples(make), Samples(lambda i, x: (x, i % CLASSES))


def tensors(row: int, value: float) -> Any:
    """A set of tensors with one odd number in a late row."""
    x = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1))
    x[row, 3] = value
    return torch.utils.data.TensorDataset(x, torch.arange(48) % CLASSES), both(lambda i, x: x)[1]


def fail_at_three(i: int, x: torch.Tensor) -> Any:
    return x, [0, 1, 2][i]


def once_more(i: int, x: torch.Tensor) -> Any:
    COUNT[0] += 1
    return x + COUNT[0], i % CLASSES


COUNT = [0]
NAN = float("nan")
DATA: dict[str, Callable[[], Any]] = {
    "plain": lambda: both(lambda i, x: (x, i % CLASSES)),
    "nan": lambda: both(lambda i, x: (x * (NAN if i == 5 else 1), i % CLASSES)),
    "late nan": lambda: tensors(31, NAN),
    "late infinity": lambda: tensors(31, float("inf")),
    "nan target": lambda: both(lambda i, x: (x, x[:CLASSES] * (NAN if i == 2 else 1))),
    "fails": lambda: both(fail_at_three),
    "lengths": lambda: both(lambda i, x: (x[: 3 + i], i % CLASSES)),
    "words": lambda: both(lambda i, x: (f"sample {i}", i % CLASSES)),
    "no target": lambda: both(lambda i, x: x),
    "targets of None": lambda: both(lambda i, x: (x, None)),
    "classes": lambda: both(lambda i, x: (x, i)),
    "one column": lambda: both(lambda i, x: (x, x.sum())),
    "integers": lambda: both(lambda i, x: ((x * 4).long(), i % CLASSES)),
    "ids": lambda: both(lambda i, x: (torch.arange(5) + i, i % CLASSES)),
    "counted": lambda: both(once_more),
    "empty": lambda: ([], both(lambda i, x: x)[1]),
    "one set": lambda: both(lambda i, x: x)[0],
    "no length": lambda: (iter([]), iter([])),
    "nan test": lambda: (
        both(lambda i, x: (x, i % CLASSES))[0],
        Samples(lambda i, x: (x * NAN, 0)),
    ),
}
