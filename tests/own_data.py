"""Data sets as users have them: texts, rows with labels, augmented, slow, failing ones."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Subset

from hybrid import cross_entropy

WORDS = 101


class Own(Dataset[Any]):
    """Gives what a function makes of each index."""

    def __init__(self, size: int, make: Callable[[int], Any]) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Any:
        return self.make(i)


class Together(Own):
    """Reads several samples by one call."""

    def __getitems__(self, ids: list[int]) -> list[Any]:
        return [self.make(i) for i in ids]


def noise(i: int) -> float:
    """A number drawn from the three generators that data sets use."""
    return float(torch.rand(()) + numpy.random.rand() + random.random())


def augmented(i: int) -> tuple[torch.Tensor, int]:
    """Five numbers and a class; the numbers are others in each epoch."""
    return torch.linspace(0, 1, 5) * (i + 1) / 50 + noise(i), i % 3


def sentence(i: int) -> list[int]:
    """Two to eight words, the same in each epoch."""
    return [(i * 31 + k * 7) % WORDS for k in range(2 + i * 5 % 7)]


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads sentences to the longest of them; each word is the target of the one before it."""
    words = [torch.tensor(row[:-1]) for row in rows]
    following = [torch.tensor(row[1:]) for row in rows]
    return pad_sequence(words, True), pad_sequence(following, True, -100)


def sentences(size: int = 50) -> tuple[Any, Any, Any]:
    """Sentences of many lengths, with a function that pads them; the longest one is a test's."""
    return Own(size, sentence), Own(11, lambda i: sentence(i) + [5, 6, 7, 8, 9, 10] * (i == 3)), pad


def augmented_sets(together: bool = False) -> tuple[Any, Any]:
    """Sets that draw random numbers, one by one or together; a part of a larger one."""
    kind = Together if together else Own
    return Subset(kind(60, augmented), range(9, 59)), kind(11, augmented)


def slow(delay_s: float = 0.02, size: int = 48) -> tuple[Any, Any]:
    """Sets that take a while for each sample."""

    def make(i: int) -> tuple[torch.Tensor, int]:
        time.sleep(delay_s)
        return augmented(i)

    return Own(size, make), Own(3, make)


def failing(at: int = 17, size: int = 50) -> tuple[Any, Any]:
    """Sets that have one sample that cannot be read."""

    def make(i: int) -> tuple[torch.Tensor, int]:
        if i == at:
            raise KeyError("no such picture")
        return torch.zeros(5), i % 3

    return Own(size, make), Own(3, make)


def word_model() -> tuple[list[nn.Module], Any]:
    """Predicts each next word from the one before it, so padding changes no other word."""
    layers = [nn.Embedding(WORDS, 7), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, WORDS)]
    return layers, cross_entropy


class Sleepy(nn.Linear):
    """Takes a while in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(0.06)
        return super().forward(x)


def class_model(sleepy: bool = False) -> tuple[list[nn.Module], Any]:
    """Tells three classes from five numbers."""
    first = Sleepy(5, 7) if sleepy else nn.Linear(5, 7)
    return [first, nn.Tanh(), nn.Linear(7, 5), nn.Linear(5, 3)], cross_entropy
