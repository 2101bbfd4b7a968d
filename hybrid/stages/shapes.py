"""This module finds what each layer returns, without memory or compute, before a process starts.

The layers run one after another on the meta device, where tensors have shapes and dtypes but no
numbers (https://docs.pytorch.org/docs/stable/meta.html); layers that need numbers run for real, on
two or three rows. `hybrid.stages.checks` judges what is found."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..data.loader import load_micro_batch
from ..job.errors import first_line
from ..models.layers import Layers
from .checks import ROWS, Boundary


@dataclasses.dataclass(frozen=True)
class _Output:
    """Holds what a layer returned for one number of rows, or why it could not be run."""

    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    num_bytes: int = 0
    problem: str | None = None
    unknown: str | None = None


def boundaries(layers: Layers, samples: Sequence[Any], rows: int = 2) -> list[Boundary]:
    """Return what each layer returns, in order, up to the first that cannot be run.

    samples: the train set, whose first sample is repeated. Each shape is found for `rows` and for
    one row more, to tell axes of rows from others. `rows` is 2 or more, since some layers
    (batch norms) refuse one row. The list is empty for a model that joins its layers itself
    (`hybrid.models.cutting`): that is no chain, and by design it passes one floating tensor between
    stages. A layer that needs numbers runs for real, which may change its buffers."""
    if type(layers).join is not Layers.join:
        return []
    few, more = (_run(layers, samples, n) for n in (rows, rows + 1))
    return [_compare(i, rows, a, b) for i, (a, b) in enumerate(zip(few, more, strict=False))]


def _run(layers: Layers, samples: Sequence[Any], rows: int) -> list[_Output]:
    """Return what each layer returns for `rows` copies of a sample, until one cannot be run."""
    with torch.random.fork_rng(devices=[]):
        outputs = _chain(layers, samples, rows, _on_meta)
        real = not any(p.is_meta for layer in layers for p in layer.parameters())
        if real and outputs and outputs[-1].unknown:
            outputs = _chain(layers, samples, rows, operator.call)
    return outputs


def _chain(
    layers: Layers, samples: Sequence[Any], rows: int, call: Callable[[nn.Module, Any], Any]
) -> list[_Output]:
    outputs: list[_Output] = []
    value: Any = None
    for layer in layers:
        try:
            if not outputs:
                value = load_micro_batch(samples, [0], rows, targets=False).input
            value = call(layer, value)
            outputs.append(_describe(value))
        except Exception as error:  # a user's layer may raise anything
            outputs.append(_Output(unknown=first_line(error)))
            break
    return outputs


def _on_meta(layer: nn.Module, value: Any) -> Any:
    """Call a layer on tensors without numbers, and leave the layer as it is."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    stand_ins = {
        name: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }
    with torch.device("meta"):
        return torch.func.functional_call(layer, stand_ins, (_to_meta(value),))


def _to_meta(value: Any) -> Any:
    """Return a value with its tensors, also those in containers, on the meta device."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, Mapping):
        return {key: _to_meta(v) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(v) for v in value)
    return value


def _describe(value: Any) -> _Output:
    tensors = value if isinstance(value, tuple) else (value,)
    if not tensors or not all(isinstance(t, torch.Tensor) for t in tensors):
        mend = "return a tensor or a tuple of floating tensors"
        return _Output(problem=f"{_kind(value)}: {mend}")
    problems = [problem for t in tensors if (problem := _tensor_problem(t))]
    return _Output(
        tuple(tuple(t.shape) for t in tensors),
        tuple(_dtype(t) for t in tensors),
        sum(t.numel() * t.element_size() for t in tensors),
        problems[0] if problems else None,
    )


def _tensor_problem(tensor: torch.Tensor) -> str | None:
    """Say why a tensor cannot pass between stages, whatever its dtype, or return None if it can."""
    if tensor.is_floating_point() and not tensor.requires_grad:
        return (
            f"a {_dtype(tensor)} tensor through which no gradient flows: make such a tensor in "
            "each layer that needs it, as a buffer"
        )
    return None


def _compare(layer: int, rows: int, few: _Output, more: _Output) -> Boundary:
    """Make a boundary from what the layer returned for `rows` and for one row more."""
    if few.unknown or more.unknown:
        return Boundary(layer, unknown=few.unknown or more.unknown)
    if [len(s) for s in few.shapes] != [len(s) for s in more.shapes] or few.dtypes != more.dtypes:
        return Boundary(layer, unknown=f"returns other tensors for {rows} rows than for one more")
    shapes = tuple(
        tuple(_axis(a, b, rows) for a, b in zip(one, other, strict=True))
        for one, other in zip(few.shapes, more.shapes, strict=True)
    )
    return Boundary(layer, shapes, few.dtypes, more.num_bytes - few.num_bytes, few.problem)


def _axis(few: int, more: int, rows: int) -> int | str:
    """Return a size that does not depend on the rows, or a text that says how it does."""
    factor = more - few
    if factor == 0:
        return few
    rest = few - factor * rows
    return (ROWS if factor == 1 else f"{factor}*{ROWS}") + (f"{rest:+d}" if rest else "")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(value: Any) -> str:
    """Describe a value's type in words: `a dict`, `a tuple with a NoneType in it`."""
    if isinstance(value, tuple):
        if not value:
            return "an empty tuple"
        odd = next(v for v in value if not isinstance(v, torch.Tensor))
        return f"a tuple with a {type(odd).__name__} in it"
    return f"a {type(value).__name__}"
