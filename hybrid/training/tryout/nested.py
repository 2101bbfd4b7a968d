"""This module looks into inputs, outputs and targets, which may be tensors nested in containers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """List the tensors in a value, also those in tuples, lists and mappings, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors_in(inner)


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a value of the same containers, with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(inner, change) for key, inner in value.items()}
        # transformers' outputs are mappings with attributes, made from keyword arguments.
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(inner, change) for inner in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(inner, change) for inner in value)
    return value


class NoRows(Exception):
    """Says that a tensor has no rows of samples along its first axis."""


def take_rows(value: Any, rows: Sequence[int], total: int) -> Any:
    """Return the rows of some samples, of `total`, from each tensor in a value.

    A tensor of `n * total` rows has n of each sample, one after another (its tokens). Raises NoRows
    where a tensor has others."""

    def select(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] % total or not tensor.shape[0]:
            raise NoRows
        each = tensor.shape[0] // total
        return tensor.unflatten(0, (total, each))[list(rows)].flatten(0, 1)

    return map_tensors(value, select)


def all_finite(value: Any) -> bool:
    """Return whether every floating tensor in a value is finite."""
    return all(bool(t.isfinite().all()) for t in tensors_in(value) if is_float(t))


def is_float(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds floating-point or complex numbers, which can be not finite."""
    return (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_meta


def differs(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Return whether two values have other tensors, beyond `tolerance` of the greatest number.

    Two that are not a number are the same, and so are infinities of one sign."""
    mine, theirs = list(tensors_in(one)), list(tensors_in(other))
    if len(mine) != len(theirs):
        return True
    return any(_differ(a, b, tolerance) for a, b in zip(mine, theirs, strict=True))


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    if one.layout is not torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if not is_float(one) or not one.numel():
        return not torch.equal(one, other)
    gap = torch.where((one == other) | (one.isnan() & other.isnan()), 0, (one - other).abs())
    finite = other.abs()[other.isfinite()]
    size = float(finite.max()) if finite.numel() else 0.0
    return not bool((gap <= tolerance * size).all())
