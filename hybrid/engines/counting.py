"""This module tells how many targets a loss will count in a micro-batch, before its forward pass.

Engines divide by the count of the whole batch before they take gradients, so they need it then."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

from ..data.loader import MicroBatch
from ..job.errors import JobError, RunError, first_line
from ..models.losses import Count, Loss, find_count, take_loss
from .state import on_device


class _Form(NamedTuple):
    """Holds the shape and dtype of one tensor of an output."""

    shape: torch.Size
    dtype: torch.dtype


class TargetCounter:
    """Asks a loss for its counts.

    The data may tell the count (`MicroBatch.num_targets`), or the loss by its own `count`. Another
    loss is called with zeros, which have the shape of the first output that was seen. Engines
    compare each answer with what the loss then really counted."""

    def __init__(self, loss: Loss, device: torch.device) -> None:
        self.loss, self.device = loss, device
        self.output: Any = None  # of the first forward pass that was seen, with forms for tensors
        self.target: torch.Size = torch.Size()

    @property
    def needs_output(self) -> bool:
        """Tell whether an output must be seen before this loss can be asked; alike on all ranks."""
        return find_count(self.loss) is None

    def see(self, output: Any, target: Any) -> None:
        """Note the shapes of an output, padding included; only the first is kept."""
        if self.output is None and self.needs_output:
            self.output = tree_map(_form, output)
            self.target = first_shape(target)

    def count(self, micro_batch: MicroBatch) -> int | float:
        """Return what the loss will count in a micro-batch.

        Raises RunError where the loss cannot be asked, or counts no number from 0 up."""
        if micro_batch.num_targets is not None:
            return micro_batch.num_targets
        rows = micro_batch.ids.shape[0]
        if rows == 0:
            return 0
        target = real_rows(micro_batch.target, rows, num_rows(micro_batch.target))
        count = find_count(self.loss)
        found = number(count(target) if count else self._ask(target))
        if not 0 <= found < math.inf:
            raise RunError(f"the loss counts {found} targets; a count is a number from 0 up")
        return found

    @torch.no_grad()
    def _ask(self, target: Any) -> Count:
        """Call the loss with zeros in place of the output."""
        if self.output is None:
            raise RunError("the loss was asked for its count before an output was seen")
        batch = MicroBatch(None, target, torch.empty(0)).copied()  # which the loss may change
        target = on_device(batch, self.device).target
        shape = first_shape(target)
        output = tree_map(lambda part: self._zeros(part, shape), self.output, is_leaf=_is_form)
        try:
            return take_loss(self.loss, output, target)[1]
        except JobError:
            raise
        except Exception as error:  # a loss of the job's own may raise anything
            shapes = [list(t.shape) for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
            raise RunError(
                f"the loss could not be asked how many targets it counts, with zeros of {shapes} "
                f"as output: {first_line(error)}; give it an attribute count(target)"
            ) from error

    def _zeros(self, part: Any, shape: torch.Size) -> Any:
        """Return zeros like an output's tensor, with the sizes that this target has now.

        Of an axis that had the target's size at the same place, such as rows or the length of a
        sequence, the size follows the target."""
        if not isinstance(part, _Form):
            return part
        sizes = list(part.shape)
        for axis, (first, now) in enumerate(zip(self.target, shape, strict=False)):
            if axis < len(sizes) and sizes[axis] == first:
                sizes[axis] = now
        return torch.zeros(sizes, dtype=part.dtype, device=self.device)


def number(count: Count) -> int | float:
    """Return a count as a Python number, whole ones as int."""
    value = count.item() if isinstance(count, torch.Tensor) else count
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return int(value)


def real_rows(value: Any, rows: int, padded: int) -> Any:
    """Cut off the rows that pad a micro-batch of `rows` samples to `padded`.

    value: tensors in any nesting of tuples, lists and dicts. Raises RunError for a tensor that has
    not one row a sample."""
    return value if rows == padded else tree_map(lambda v: _cut(v, rows, padded), value)


def _cut(value: Any, rows: int, padded: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 0 or value.shape[0] != padded:
        raise RunError(
            f"a padded micro-batch needs outputs and targets with one row a sample ({padded}), "
            f"got shape {list(value.shape)}; choose train.global_batch so that it divides evenly"
        )
    return value[:rows]


def num_rows(value: Any) -> int:
    """Count the rows of a micro-batch's input or target, padding included."""
    return first_shape(value)[0]


def first_shape(value: Any) -> torch.Size:
    """Return the shape of the first tensor in a nesting of tuples, lists and dicts."""
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value.shape


def _form(value: Any) -> Any:
    return _Form(value.shape, value.dtype) if isinstance(value, torch.Tensor) else value


def _is_form(value: Any) -> bool:
    return isinstance(value, _Form)
