"""This module computes activations again in backward, from the state that the forward pass had.

Layers may keep state in buffers that each training pass moves, such as the running statistics of
batch norm. The repetition begins with what the pass began with, and leaves the buffers as they are:
they move once for each micro-batch, as without recomputation."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..data.loader import copied, was_changed
from ..models.draws import forward_pass, is_placed
from ..models.dropout import Seeds, rows_in_use, use_rows
from .buffers import same_values
from .compiled import compile_function

Place = tuple[nn.Module, str]  # a module, and its own name of a buffer
CHANGES = "_changes_inputs"  # the attribute of a block that says whether it does, in place
DRAWS = "_draws_by_functions"  # the attribute of a block that says whether it does
MOVING = "_moving_buffers"  # the attribute of a block that lists the places of buffers that move


@functools.cache
def recomputed(kind: type[nn.Module], compiled: bool = False) -> type[nn.Module]:
    """Make a class like `kind` that keeps no activations and computes them again in backward.

    It is a subclass, not a wrapper, so that the names of parameters, and the class name that FSDP
    looks for, stay as they are. compiled: what is computed, and computed again, is compiled. The
    repetition itself is not: torch.compile would give it none of the state below."""
    compute = compile_function(kind.forward) if compiled else kind.forward

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return compute(self, *args, **options)
        # Keywords are bound here, since some could be those of `checkpoint` itself.
        inner = functools.partial(_run, compute, self, **options)
        before = _copy_moving(self)
        contexts = functools.partial(_same_state, before) if before else _same_rows
        out = checkpoint(inner, *args, use_reentrant=False, context_fn=contexts)
        if before and MOVING not in self.__dict__:
            self.__dict__[MOVING] = [place for place in before if _moves(place, before[place])]
        return out

    return type(kind.__name__, (kind,), {"forward": forward, "recomputed": True})


def _run(compute: Callable[..., Any], block: Any, *args: Any, **options: Any) -> Any:
    """Run a block's own forward pass, in which its draws are counted from 0 in either pass.

    The repetition calls no hooks of the block itself. A block that changes what it is given, in
    place, gets a copy: the repetition would begin with what was changed."""
    if not block.__dict__.get(CHANGES, True):
        return _count_draws(compute, block, *args, **options)
    args = copied(args)
    out = _count_draws(compute, block, *args, **options)
    block.__dict__[CHANGES] = was_changed(args)
    return out


def _count_draws(compute: Callable[..., Any], block: Any, *args: Any, **options: Any) -> Any:
    if not block.training or not is_placed(block) or not block.__dict__.get(DRAWS, True):
        return compute(block, *args, **options)
    with forward_pass(block) as this:
        out = compute(block, *args, **options)
    block.__dict__[DRAWS] = this.draws > 0
    return out


def _copy_moving(block: nn.Module) -> dict[Place, torch.Tensor]:
    """Copy the buffers of a block that move; before its first pass, all of them."""
    places = block.__dict__.get(MOVING)
    if places is None:
        modules = list(block.modules())
        places = [(m, key) for m in modules for key, b in m._buffers.items() if b is not None]
        if not places:
            block.__dict__[MOVING] = []
    held = ((place, place[0]._buffers[place[1]]) for place in places)
    return {place: buffer.detach().clone() for place, buffer in held if buffer is not None}


def _moves(place: Place, before: torch.Tensor) -> bool:
    """Tell whether a pass moved a buffer; batch norm leaves out micro-batches of padding alone."""
    module, key = place
    now = module._buffers.get(key)
    return isinstance(module, _BatchNorm) or now is None or not same_values(now, before)


def _same_rows() -> tuple[Any, Any]:
    """Return contexts for a pass and for its repetition.
    The repetition may come while the rows of another micro-batch are in use."""
    return contextlib.nullcontext(), use_rows(rows_in_use())


def _same_state(before: dict[Place, torch.Tensor]) -> tuple[Any, Any]:
    """Return contexts as `_same_rows` does; `before`: the buffers for the repetition."""
    return contextlib.nullcontext(), _as_before(before, rows_in_use())


@contextlib.contextmanager
def _as_before(before: dict[Place, torch.Tensor], rows: Seeds | None) -> Iterator[None]:
    """Put copies of buffers in the place of the live ones, which nothing then changes."""
    live = {place: place[0]._buffers[place[1]] for place in before}
    for (module, key), kept in before.items():
        module._buffers[key] = kept
    try:
        with use_rows(rows):
            yield
    finally:
        for (module, key), buffer in live.items():
            module._buffers[key] = buffer
