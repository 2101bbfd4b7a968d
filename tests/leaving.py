"""Functions of a user's own that raise, or leave, in many ways: `kind` says how, `where` in which.

`tests/test_users_code.py` names them by their import paths. No torch until one is called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Odd(BaseException):
    """No Exception, so that `except Exception` lets it through."""


class Mute(Exception):
    """An error whose message cannot be read."""

    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


class Long(Exception):
    """An error with a message that fills a screen."""

    def __str__(self) -> str:
        return "x" * 10**6


def throw(error: BaseException) -> Any:
    raise error


def recurse() -> Any:
    return recurse()


def look_up() -> Any:
    return {"a": 1}["k"]


def get_attribute() -> Any:
    return (None or object()).nothing  # type: ignore[attr-defined]


def import_missing() -> Any:
    import no_such_package_here  # noqa: F401


def import_name() -> Any:
    from tests.leaving import no_such_name_here  # noqa: F401


# kind: what is done, and the words of it in the line.
KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "exit 0": (lambda: sys.exit(0), "SystemExit: it ends the program, with status 0"),
    "exit": (lambda: sys.exit(), "status 0"),
    "exit 3": (lambda: sys.exit(3), "status 3"),
    "exit with words": (lambda: sys.exit("usage"), "status 1: usage"),
    "exit at once": (lambda: os._exit(0), "SystemExit: it ends the program, with status 0"),
    "key": (look_up, "KeyError: 'k'"),
    "file": (lambda: Path("/nope").read_text(), "FileNotFoundError: [Errno 2]"),
    "attribute": (get_attribute, "AttributeError: 'object' object has no"),
    "recursion": (recurse, "recursion depth"),
    "mute": (lambda: throw(Mute()), "Mute: its __str__ raised ValueError"),
    "long": (lambda: throw(Long()), "Long: xxx"),
    "odd": (lambda: throw(Odd("odd")), "Odd: odd"),
    "group": (lambda: throw(ExceptionGroup("two", [KeyError("a"), Mute()])), "KeyError: 'a'"),
    "base group": (lambda: throw(BaseExceptionGroup("two", [Odd("b")])), "two (1 sub-exception)"),
    "missing package": (import_missing, "No module named 'no_such_package_here'"),
    "missing name": (import_name, "cannot import name 'no_such_name_here'"),
    "stop": (lambda: throw(StopIteration()), "StopIteration"),
    "close": (lambda: throw(GeneratorExit()), "GeneratorExit"),
    "two lines": (lambda: throw(OSError("one\ntwo")), "OSError: one"),
}


def act(kind: str) -> Any:
    return KINDS[kind][0]()


def model(kind: str, where: str = "model") -> Any:
    """A plain model whose function, layer or loss does it."""
    from torch import nn

    from hybrid.models.losses import cross_entropy

    class Layer(nn.Linear):
        def forward(self, x: Any) -> Any:
            """Maps [batch, 16] to [batch, 4]."""
            return act(kind) if where == "layer" else super().forward(x)

    def loss(output: Any, target: Any) -> Any:
        return act(kind) if where == "loss" else cross_entropy(output, target)

    return act(kind) if where == "model" else ([Layer(16, 4)], loss)


class Samples:
    """A set of 9 samples, whose length, or third sample, does it."""

    def __init__(self, kind: str, where: str) -> None:
        self.kind, self.where = kind, where

    def __len__(self) -> int:
        return int(act(self.kind)) if self.where == "length" else 9

    def __getitem__(self, i: int) -> Any:
        import torch

        return act(self.kind) if self.where == "sample" and i == 2 else (torch.ones(16) * i, i % 4)


def data(kind: str, where: str = "data") -> Any:
    """Plain sets, whose function, length, sample or collate function does it."""
    from torch.utils.data import default_collate

    def collate(rows: Any) -> Any:
        return act(kind) if where == "collate" else default_collate(rows)

    both = Samples(kind, where), Samples(kind, where)
    return act(kind) if where == "data" else (*both, collate)


def optimizer(groups: Any, lr: float, kind: str) -> Any:
    return act(kind)


def schedule(step: int, kind: str) -> Any:
    return act(kind)


def layout(job: Any, nproc: int) -> Any:
    return act(job.model.options["kind"])


name, summary, build = "leaving", "a strategy whose layout does it", None
for _kind in KINDS:  # a metric has no options: there is one of each name
    globals()["metric_" + _kind.replace(" ", "_")] = lambda o, t, kind=_kind: act(kind)
