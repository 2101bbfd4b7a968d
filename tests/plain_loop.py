"""A training loop as anyone would write it: twenty lines of torch that import nothing of `hybrid`.

With several replicas it is local SGD, merged after every step. `plain_order` is the order of the
samples, number by number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch


def plain_loop(
    make_model: Callable[[], Any],
    make_data: Callable[[], Any],
    steps: int,
    shares: Callable[[int], list[list[int]]],
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of each step and the final weights. `shares(step)`: sample ids of each replica."""
    torch.manual_seed(0)
    layers, loss = make_model()
    samples, _ = make_data()
    models = [torch.nn.Sequential(*copy.deepcopy(layers)) for _ in shares(0)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.003, weight_decay=0.1) for m in models]
    losses = []
    for step in range(steps):
        total = count = 0.0
        for model, optimizer, ids in zip(models, optimizers, shares(step), strict=True):
            x = torch.stack([samples[i][0] for i in ids])
            y = torch.stack([samples[i][1] for i in ids])
            summed, counted = loss(model(x), y)
            (summed / counted).backward()
            optimizer.step()
            optimizer.zero_grad()
            total, count = total + summed.item(), count + counted
        for tensors in zip(*(m.parameters() for m in models), strict=True):
            mean = torch.stack([t.data for t in tensors]).mean(0)
            for t in tensors:
                t.data.copy_(mean)
        losses.append(float(total / count))
    return losses, {name: t.detach() for name, t in models[0].named_parameters()}


def plain_order(total: int, seed: int, epoch: int) -> list[int]:
    """The samples of an epoch in their order: what `hybrid.data.permutation` says of its rule."""

    def splitmix(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    def draw(half: int, key: int, below: int) -> int:
        z = (half + key) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 32) * 0x94D049BB133111EB % 2**64
        return (z >> 32) * below >> 32

    def send(place: int) -> int:
        row, column = divmod(place, columns)
        for i in range(0, 12, 2):
            row = (row + draw(column, keys[i], rows)) % rows
            column = (column + draw(row, keys[i + 1], columns)) % columns
        place = row * columns + column
        return place if place < total else send(place)

    start = splitmix(splitmix(seed) + epoch)
    keys = [splitmix(start + i) for i in range(12)]
    rows = 2 * math.ceil(math.ceil(math.sqrt(total)) / 2)
    columns = math.ceil(total / rows)
    return [send(position) for position in range(total)]
