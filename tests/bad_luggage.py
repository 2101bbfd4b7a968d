"""What people bring that cannot be trained, or not be compared: models, losses and data sets.

`tests/test_tryout_refused.py` and `tests/test_tryout_findings.py` name each by its import path, and
say which line they want to see. The data sets themselves are in `tests/bad_data.py`.
"""

from __future__ import annotations

import random as plain_random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import nn
from torch.nn import functional as F

from hybrid.models.losses import cross_entropy
from tests.bad_data import CLASSES, DATA, WIDTH

SPREAD = nn.Parameter(torch.zeros(1))
HIDDEN = nn.Parameter(torch.ones(12))


class Odd(nn.Module):
    """A layer from 16 to 12 numbers that does one odd thing to what it returns."""

    def __init__(self, act: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.lin, self.act, self.calls = nn.Linear(WIDTH, 12), act, 0
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 12]."""
        return self.act(self, torch.tanh(self.lin(x)))


def chain(act: Any = None, loss: Any = cross_entropy, last: int = CLASSES) -> Any:
    """Two layers, the first of them odd, and a loss."""
    return [Odd(act or (lambda layer, x: x)), nn.Linear(12, last)], loss


# Models, by what `model.options` calls them.


def model(kind: str) -> Any:
    """A model that is odd in one way."""
    return MODELS[kind]()


def with_parameter(value: torch.Tensor, trained: bool = True) -> Any:
    """A first layer with one more parameter, which is used."""
    layers, loss = chain(lambda layer, x: x + layer.extra.sum().real.to(x.dtype) * 1e-3)
    layers[0].extra = nn.Parameter(value, requires_grad=trained)
    return layers, loss


def with_unused() -> Any:
    layers, loss = chain()
    layers[0].spare = nn.Linear(5, 5)
    return layers, loss


def with_nan_buffer() -> Any:
    layers, loss = chain()
    layers[0].register_buffer("table", torch.full((3,), float("nan")))
    return layers, loss


def raise_key(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return {"there": x}["not there"]


def add_noise(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x)


def add_numpy(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x + float(numpy.random.rand())


def add_random(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return x + plain_random.random()


def add_calls(layer: Any, x: torch.Tensor) -> torch.Tensor:
    layer.calls += 1
    return x * layer.calls


def move(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if layer.training:
        layer.seen.add_(1)
    return x * layer.seen[0]


class Branch(nn.Module):
    """One of two linear maps, by the sum of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 12] to [batch, 12]."""
        return torch.tanh(self.a(x) if float(x.detach().sum()) > 0 else self.b(x))


class NoForward(nn.Module):
    """A layer whose author forgot its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, 12)


def normed() -> Any:
    return [nn.Linear(WIDTH, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES)], cross_entropy


def embedding(**options: Any) -> Any:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 12, **options)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            """int64 [batch, tokens] to [batch, 12]."""
            return self.table(ids).mean(1)

    return [Bag(), nn.Linear(12, CLASSES)], cross_entropy


def as_complex(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x, x)


MODELS: dict[str, Callable[[], Any]] = {
    "plain": chain,
    "narrow": lambda: ([nn.Linear(12, 12), nn.Linear(12, CLASSES)], cross_entropy),
    "float64": lambda: with_parameter(torch.ones(3, dtype=torch.float64)),
    "complex64": lambda: with_parameter(torch.ones(3, dtype=torch.complex64)),
    "bfloat16": lambda: ([x.bfloat16() for x in chain()[0]], cross_entropy),
    "nan parameter": lambda: with_parameter(torch.full((3,), float("nan"))),
    "scalar": lambda: with_parameter(torch.ones(())),
    "frozen scalar": lambda: with_parameter(torch.ones(()), trained=False),
    "empty": lambda: with_parameter(torch.ones(0)),
    "unused": with_unused,
    "nan buffer": with_nan_buffer,
    "sparse": lambda: embedding(sparse=True),
    "few words": embedding,
    "detached": lambda: ([*chain()[0], nn.Identity()], lambda o, t: cross_entropy(o.detach(), t)),
    "no graph": lambda: ([*chain()[0], Detached()], cross_entropy),
    "raises": lambda: chain(raise_key),
    "complex output": lambda: chain(as_complex),
    "logarithm": lambda: chain(lambda layer, x: x.log()),
    "root": lambda: chain(lambda layer, x: x + (x * 0).sqrt()),
    "global": lambda: chain(lambda layer, x: x * HIDDEN),
    "no forward": lambda: ([NoForward(), nn.Linear(12, CLASSES)], cross_entropy),
    "rows lost": lambda: chain(lambda layer, x: x[1:]),
    "noise": lambda: chain(add_noise),
    "numpy": lambda: chain(add_numpy),
    "random": lambda: chain(add_random),
    "state": lambda: chain(add_calls),
    "centred": lambda: chain(lambda layer, x: x - x.mean(0)),
    "moving": lambda: chain(move),
    "branch": lambda: ([Odd(lambda _, x: x), Branch(), nn.Linear(12, CLASSES)], cross_entropy),
    "normed": normed,
    "three": lambda: (*chain(), 3),
    "no layer": lambda: ([*chain()[0], 3], cross_entropy),
    "frozen": lambda: ([x.requires_grad_(False) for x in chain()[0]], cross_entropy),
    "nothing": lambda: None,
    "no loss": lambda: (chain()[0], 3),
}


class Detached(nn.Module):
    """A layer that cuts the graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 4] to the same."""
        with torch.no_grad():
            return x * 2


# Losses.


def lossy(kind: str, last: int = CLASSES) -> Any:
    """The plain model with a loss that is odd in one way."""
    return chain(loss=LOSSES[kind], last=last)


def of_classes(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, reduction="none")


def contrast(output: torch.Tensor, target: torch.Tensor) -> Any:
    """Every sample against all others in the micro-batch."""
    return F.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="sum"), len(
        target
    )


def spread(output: torch.Tensor, target: torch.Tensor) -> Any:
    return (of_classes(output, target) * torch.exp(-SPREAD)).sum(), len(target)


def shaken(output: torch.Tensor, target: torch.Tensor) -> Any:
    return of_classes(output + torch.randn_like(output), target).sum(), len(target)


def wrong_classes(output: torch.Tensor, target: torch.Tensor) -> Any:
    return F.cross_entropy(output, target + 7, reduction="sum"), len(target)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "mean": lambda o, t: (F.cross_entropy(o, t), len(t)),
    "mean of one": lambda o, t: (F.cross_entropy(o, t), 1),
    "count of one": lambda o, t: (of_classes(o, t).sum(), 1),
    "broadcast": lambda o, t: (((o - t) ** 2).sum(), len(t)),
    "contrast": contrast,
    "batch variance": lambda o, t: (o.var(0).sum() * len(t), len(t)),
    "unreduced": lambda o, t: (of_classes(o, t), len(t)),
    "a number": lambda o, t: (of_classes(o, t).sum().item(), len(t)),
    "no count": lambda o, t: (of_classes(o, t).sum(), None),
    "three": lambda o, t: (of_classes(o, t).sum(), len(t), 0),
    "negative count": lambda o, t: (of_classes(o, t).sum(), -len(t)),
    "nan count": lambda o, t: (of_classes(o, t).sum(), float("nan")),
    "classes": wrong_classes,
    "infinite": lambda o, t: ((o.softmax(-1) * 0).log().sum(), len(t)),
    "shapes": lambda o, t: (F.mse_loss(o, t.float(), reduction="sum"), len(t)),
    "spread": spread,
    "shaken": shaken,
}


# Data.


def data(kind: str) -> Any:
    """Sets that are odd in one way."""
    return DATA[kind]()
