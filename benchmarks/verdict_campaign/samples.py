"""Draws the train and test sets of the random jobs from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import TensorDataset

from hybrid.data.targets import IGNORED_TARGET

TEST_SAMPLES = 13  # which divides by nothing
Sets = tuple[TensorDataset, TensorDataset]


def numbers(
    samples: int, shape: Sequence[int], outputs: int, classes: bool, ignored: float, seed: int
) -> Sets:
    """Draw normal inputs float32 `shape`, with classes or smooth numbers as targets.

    classes: targets int64 [] below `outputs`, a share `ignored` of them -100; else float32
    [outputs], and none is ignored."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples + TEST_SAMPLES, *shape, generator=draw)
    mixed = inputs.flatten(1) @ torch.randn(inputs[0].numel(), outputs, generator=draw)
    target = mixed.argmax(1) if classes else torch.sin(mixed)
    if classes:
        target[torch.rand(len(target), generator=draw) < ignored] = IGNORED_TARGET
    return _cut(inputs, target, samples)


def tokens(samples: int, tokens: int, vocab_size: int, ignored: float, seed: int) -> Sets:
    """Draw sequences that step through the vocabulary, with the next tokens as targets.

    Inputs and targets are int64 [tokens]; a share `ignored` of the targets is -100."""
    ids = _steps(samples, tokens + 1, vocab_size, seed)
    target = ids[:, 1:].clone()
    draw = torch.Generator().manual_seed(seed + 1)
    target[torch.rand(target.shape, generator=draw) < ignored] = IGNORED_TARGET
    return _cut(ids[:, :-1].contiguous(), target, samples)


def bags(
    samples: int, tokens: int, vocab_size: int, outputs: int, classes: bool, seed: int
) -> Sets:
    """Draw bags of tokens int64 [tokens], with a class int64 [] or numbers float32 [outputs]."""
    ids = _steps(samples, tokens, vocab_size, seed)
    target = ids[:, 0] % outputs
    if not classes:
        target = torch.sin(ids[:, :1] * torch.arange(1.0, outputs + 1))
    return _cut(ids, target, samples)


def _steps(samples: int, tokens: int, vocab_size: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    count = samples + TEST_SAMPLES
    starts = torch.randint(vocab_size, (count, 1), generator=draw)
    steps = torch.randint(1, 4, (count, tokens - 1), generator=draw)
    return torch.cat((starts, steps), 1).cumsum(1) % vocab_size


def _cut(inputs: torch.Tensor, target: torch.Tensor, samples: int) -> Sets:
    train = TensorDataset(inputs[:samples].clone(), target[:samples].clone())
    return train, TensorDataset(inputs[samples:].clone(), target[samples:].clone())
