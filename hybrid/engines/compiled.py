"""This module compiles layers, and watches what is compiled and computed without hooks.

torch.compile compiles a hook along with its layer, so when the hook goes, every layer is compiled
once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_watchers: list[Callable[[torch.dtype], None]] = []


def compile_layer(layer: nn.Module) -> None:
    """Have torch.compile compile a layer, by inductor, when it is called."""
    layer.compile(backend=_inductor)


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what torch.compile makes of a function, by inductor, when it is called."""
    return torch.compile(function, backend=_inductor)


def watch_parameters(note: Callable[[torch.dtype], None]) -> Callable[[], None]:
    """Call `note` with the dtype in which each parameter is used in what is compiled from now on.

    Returns what ends that."""
    _watchers.append(note)
    return lambda: _watchers.remove(note)


def watch_output(layer: nn.Module, note: Callable[[Any], None]) -> Callable[[], None]:
    """Call `note` with each output of a layer, and return what ends that."""
    compiled: Any = layer._compiled_call_impl
    if compiled is None:  # nothing is compiled, or the layer's function, without its hooks
        return layer.register_forward_hook(lambda _module, _args, output: note(output)).remove

    def call(*arguments: Any, **options: Any) -> Any:
        output = compiled(*arguments, **options)
        note(output)
        return output

    def end() -> None:
        layer._compiled_call_impl = compiled

    layer._compiled_call_impl = call
    return end


def _inductor(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
    """Compile a graph as torch.compile does by default."""
    for dtype in parameter_dtypes(graph.graph) if _watchers else ():
        for note in _watchers:
            note(dtype)
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def parameter_dtypes(graph: fx.Graph) -> set[torch.dtype]:
    """Return in which dtypes a graph of torch.compile's uses floating-point parameters.

    One that is rounded at its use (`round_at_use`) counts as what it is rounded to."""
    found = set()
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, nn.Parameter) and value.is_floating_point():
            casts = [user for user in node.users if user.target == "to"]
            rounded = casts if "parametrizations" in node.name else []
            used = [user.meta["example_value"] for user in rounded] or [value]
            found |= {tensor.dtype for tensor in used}
    return found
