"""This module notes which of torch's losses are called, and with what, while code runs.

So it is known, not guessed from shapes, that an output holds class scores, and along which axis."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from .torch_losses import FUNCTIONS

_unseen: list[None] = []  # not empty: calls are ours, not those of the code that is watched


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Let losses of torch be called that no context is to list."""
    _unseen.append(None)
    try:
        yield
    finally:
        _unseen.pop()


class LossCall(NamedTuple):
    """Holds one call of a function of `torch.nn.functional`.

    arguments: by name, with defaults. result: what it returned. value: a copy of that, without its
    graph, which nothing changes in place."""

    name: str
    arguments: Mapping[str, Any]
    result: torch.Tensor
    value: torch.Tensor


class LossCalls(TorchFunctionMode):
    """Is a context in which `calls` lists the losses of torch that are called, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[LossCall] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = FUNCTIONS.get(func)
        if name and isinstance(result, torch.Tensor) and not _unseen:
            bound = inspect.signature(func).bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            self.calls.append(LossCall(name, bound.arguments, result, result.detach().clone()))
        return result
