"""Finds what each layer of a model returns, without memory or compute, before any process starts.

The layers run one after another on the meta device, where tensors have shapes and dtypes but no
numbers (https://docs.pytorch.org/docs/stable/meta.html); layers that need numbers run for real, on
two or three rows. `hybrid.stages.checks` judges what is found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from ..models.layers import Layers
from .checks import ROWS, Boundary


@dataclasses.dataclass(frozen=True)
class _Output:
    """What a layer returned for one number of rows; or why it could not be run."""

    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    num_bytes: int = 0
    problem: str | None = None
    unknown: str | None = None


def boundaries(layers: Layers, sample_input: Any, rows: int = 2) -> list[Boundary]:
    """What each layer returns, in order, up to the first that cannot be run.

    sample_input: the input of one sample, as the data set has it. Each shape is found twice, for
    `rows` and one more, to tell axes of rows from others; 2 or more, since some layers (batch
    norms) refuse one row. Empty for a model that joins its layers itself (`hybrid.models.hf`):
    that is no chain, and passes one floating tensor between stages by its making. A layer that
    needs numbers runs for real, and may change its buffers in that.
    """
    if type(layers).join is not Layers.join:
        return []
    few, more = (_run(layers, sample_input, n) for n in (rows, rows + 1))
    return [_compare(i, rows, a, b) for i, (a, b) in enumerate(zip(few, more, strict=False))]


def input_problem(sample_input: Any) -> str | None:
    """Why a first stage cannot take such an input; None where it can."""
    try:
        batch = default_collate([sample_input] * 2)
    except (TypeError, RuntimeError) as error:
        return f"its data's inputs cannot be batched: {_first_line(error)}"
    tensors = batch if isinstance(batch, (tuple, list)) else [batch]
    if all(isinstance(t, torch.Tensor) for t in tensors):
        return None
    return (
        f"its data gives {_kind(sample_input)} as an input, a first stage takes a tensor or a "
        "tuple of tensors; have the data set return one of these"
    )


def _run(layers: Layers, sample_input: Any, rows: int) -> list[_Output]:
    """What each layer returns for `rows` copies of a sample, ending at one that cannot be run."""
    with torch.random.fork_rng(devices=[]):
        outputs = _chain(layers, sample_input, rows, _on_meta)
        real = not any(p.is_meta for layer in layers for p in layer.parameters())
        if real and outputs and outputs[-1].unknown:
            outputs = _chain(layers, sample_input, rows, _for_real)
    return outputs


def _chain(
    layers: Layers, sample_input: Any, rows: int, call: Callable[[nn.Module, Any], Any]
) -> list[_Output]:
    outputs: list[_Output] = []
    value: Any = None
    for layer in layers:
        try:
            if not outputs:
                value = _as_pipeline(default_collate([sample_input] * rows))
            value = call(layer, value)
            outputs.append(_describe(value))
        except Exception as error:  # a user's layer may raise anything
            outputs.append(_Output(unknown=_first_line(error)))
            break
    return outputs


def _on_meta(layer: nn.Module, value: Any) -> Any:
    """The layer on tensors without numbers, itself left as it is."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    stand_ins = {
        name: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }
    with torch.device("meta"):
        return torch.func.functional_call(layer, stand_ins, (_map(value, _to_meta),))


def _for_real(layer: nn.Module, value: Any) -> Any:
    return layer(value)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_meta else tensor.to("meta")


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A tensor, or what holds some, changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(v, change) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, change) for v in value)
    return value


def _as_pipeline(batch: Any) -> Any:
    """A batch as a first stage gets it: DeepSpeed makes tuples of lists."""
    return tuple(batch) if isinstance(batch, list) else batch


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
    """Why a tensor cannot pass between stages, its dtype apart."""
    if tensor.is_floating_point() and not tensor.requires_grad:
        return (
            f"a {_dtype(tensor)} tensor through which no gradient flows: make such a tensor in "
            "each layer that needs it, as a buffer"
        )
    if not tensor.is_contiguous():
        return "a tensor that is not contiguous, which cannot be sent: add .contiguous()"
    return None


def _compare(layer: int, rows: int, few: _Output, more: _Output) -> Boundary:
    """One boundary from what the layer returned for `rows` and for one row more."""
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
    """A size that does not depend on the rows, or how it does."""
    factor = more - few
    if factor == 0:
        return few
    rest = few - factor * rows
    return (ROWS if factor == 1 else f"{factor}*{ROWS}") + (f"{rest:+d}" if rest else "")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(value: Any) -> str:
    """A value's type in words: `a dict`, `a tuple with a NoneType in it`."""
    if isinstance(value, tuple):
        if not value:
            return "an empty tuple"
        odd = next(v for v in value if not isinstance(v, torch.Tensor))
        return f"a tuple with a {type(odd).__name__} in it"
    return f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
