"""Models and data sets whose own code ends a process of a run with status 0, before its end."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from hybrid.models.losses import Loss, cross_entropy


def _quits() -> None:
    sys.exit(0)


def _goes() -> None:
    os._exit(0)


def _goes_in_a_thread() -> None:
    thread = threading.Thread(target=_goes)
    thread.start()
    thread.join()


WAYS = {"quits": _quits, "goes": _goes, "goes_in_a_thread": _goes_in_a_thread}


class Leaving(nn.Linear):
    """Ends the process of one rank in its second training step or, in `eval`, at once."""

    def __init__(self, way: str, rank: int, where: str) -> None:
        super().__init__(32, 10)
        self.way, self.rank, self.where, self.calls = way, str(rank), where, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        due = self.calls == 3 if self.where == "train" else not self.training
        if due and os.environ.get("RANK") == self.rank:
            WAYS[self.way]()
        return super().forward(x)


def model(way: str, rank: int, where: str = "train") -> tuple[list[nn.Module], Loss]:
    """One layer."""
    return [Leaving(way, rank, where)], cross_entropy


class _Everywhere(nn.Linear):
    def __init__(self, way: str) -> None:
        super().__init__(32, 10)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_meta:
            WAYS[self.way]()
        return super().forward(x)


def everywhere(way: str) -> tuple[list[nn.Module], Loss]:
    """One layer that ends any process, as the one that tries the job out."""
    return [_Everywhere(way)], cross_entropy


class _Samples(Dataset[Any]):
    """Samples, of which one ends the process of a rank that reads it."""

    def __init__(self, whole: TensorDataset, rank: int) -> None:
        self.whole, self.rank = whole, str(rank)

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, i: int) -> Any:
        if os.environ.get("RANK") == self.rank:
            _goes()
        return self.whole[i]


def data(rank: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """The small job's sets."""
    from hybrid.data.random import random

    train, test = random(samples=100, test_samples=37, features=32)
    return _Samples(train, rank), test
