"""This module finds the layer where something happens first, by the inputs and outputs of each."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .nested import map_tensors


class Call(NamedTuple):
    """Holds one call of a module: its name, its class, and copies of what went in and came out."""

    name: str
    kind: str
    given: Any
    returned: Any


@contextlib.contextmanager
def note_calls(model: nn.Module) -> Iterator[list[Call]]:
    """Note every call of a module while the context lasts, in the order in which they end.

    So a layer comes before the one that it is a part of."""
    calls: list[Call] = []
    begun: list[Any] = []

    def enter(module: nn.Module, args: Any, options: Any) -> None:
        begun.append(_copy((args, options)))

    def leave(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, options: Any, output: Any) -> None:
            calls.append(Call(name, type(module).__name__, begun.pop(), _copy(output)))

        return note

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave(name), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _copy(value: Any) -> Any:
    return map_tensors(value, lambda t: t.detach().clone())


def show_layer(name: str, kind: str) -> str:
    """Name a layer for a message: `layer 1.norm (BatchNorm1d)`."""
    return f"layer {name} ({kind})" if name else f"the model's own forward ({kind})"


class _Draws(TorchFunctionMode):
    """Notes which functions move torch's generator, and in which module they are called."""

    def __init__(self, stack: list[tuple[str, str]]) -> None:
        super().__init__()
        self.stack = stack
        self.found: dict[tuple[str, str], list[str]] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = torch.default_generator.get_state()
        result = function(*args, **(kwargs or {}))
        if not torch.equal(before, torch.default_generator.get_state()):
            names = self.found.setdefault(self.stack[-1] if self.stack else ("", ""), [])
            name = getattr(function, "__name__", str(function))
            if name not in names:
                names.append(name)
        return result


def find_draws(model: nn.Module, run: Callable[[], Any]) -> dict[tuple[str, str], list[str]]:
    """Return the functions by which each module draws from torch's generator during `run`.

    The modules are named as (name, class), in the order in which they draw."""
    stack: list[tuple[str, str]] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: stack.append((name, type(module).__name__))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        with _Draws(stack) as draws:
            run()
        return draws.found
    finally:
        for handle in handles:
            handle.remove()
