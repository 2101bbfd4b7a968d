"""This module turns a module into the whole model of a job, or into one of its stages.

Methods are mixed into the class of the user's own module. All that they add begins with `stage_`,
so that it meets nothing of the user's."""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .calling import Calling
from .plan import Block, CutPlan, Place, first_tensor


def make_whole(model: nn.Module, calling: Calling, dtype: torch.dtype | None) -> nn.Module:
    """Makes a module of a whole model, which takes the input of a micro-batch.

    dtype: that of floating inputs; None leaves them as they are."""
    whole = _become(model, _Whole)
    whole.stage_calling, whole.stage_dtype = calling, dtype
    return whole


def make_stage(
    model: nn.Module,
    calling: Calling,
    dtype: torch.dtype | None,
    plan: CutPlan,
    part: range,
    ends: bool,
    absent: list[Place],
) -> nn.Module:
    """Makes a stage of the elements in `part`; `ends` says whether they are the last.

    absent: where parameters of other stages were. The stage finds the input of each micro-batch in
    its `stage_inputs`."""
    stage = _become(model, _Stage)
    stage.stage_calling, stage.stage_dtype, stage.stage_blocks = calling, dtype, plan.blocks
    stage.stage_part, stage.stage_ends, stage.stage_absent = part, ends, absent
    stage.stage_inputs = stage.stage_received = stage.stage_filled = None
    blocks = [stage.get_submodule(block.name) for block in plan.blocks]
    if 0 < part.start <= len(blocks):
        blocks[part.start - 1].register_forward_pre_hook(stage._stage_enter, with_kwargs=True)
    elif part.start:
        blocks[-1].register_forward_hook(stage._stage_enter_behind)
    if part.stop <= len(blocks):
        blocks[part.stop - 1].register_forward_pre_hook(stage._stage_leave, with_kwargs=True)
    elif not ends:
        blocks[-1].register_forward_hook(stage._stage_leave_behind)
    return stage


def hollow_out(module: nn.Module, block: Block) -> None:
    """Makes a block of another stage return its hidden state as it is."""
    _become(module, _Hollow).stage_block = block
    module._compiled_call_impl = None  # there is nothing left to compile


def _become(module: nn.Module, kind: type[nn.Module]) -> Any:
    """Puts the methods of `kind` before those of the module's own class; returns the module."""
    old = type(module)
    name = old.__name__ if kind is not _Hollow else kind.__name__.strip("_")
    module.__class__ = type(name, (kind, old), {"__module__": __name__})
    return module


class _Whole(nn.Module):
    """Is mixed into the class of a whole model."""

    stage_calling: Calling
    stage_dtype: torch.dtype | None

    def forward(self, value: Any) -> Any:
        """Maps the input of a micro-batch to the module's output."""
        args, kwargs = _arguments(self, super().forward, value)
        return self.stage_calling.output(super().forward(*args, **kwargs))


def _arguments(module: Any, forward: Any, value: Any) -> Any:
    """Returns a module's arguments, with floating tensors in the precision of its job."""
    arguments = module.stage_calling.arguments(forward, value)
    dtype = module.stage_dtype
    if dtype is None:
        return arguments

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tree_map(cast, arguments)


class _Hollow(nn.Module):
    """Is mixed into a block of another stage, which then returns the hidden state as it is."""

    stage_block: Block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the block would return if it changed nothing."""
        return self.stage_block.pass_on(self.stage_block.get(args, kwargs))

    def __repr__(self) -> str:
        return "Hollow()"  # the class's own method may need its parameters


class _Left(Exception):
    """Leaves the forward pass where the stage ends, with the hidden state there."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Stage(nn.Module):
    """Is mixed into a model by `make_stage`, and runs consecutive elements of it."""

    stage_calling: Calling
    stage_dtype: torch.dtype | None
    stage_blocks: list[Block]
    stage_part: range  # of elements
    stage_ends: bool
    stage_absent: list[Place]
    stage_inputs: Any  # of the coming micro-batch
    stage_received: torch.Tensor | None
    stage_filled: tuple[torch.dtype, torch.device] | None

    def forward(self, received: Any) -> Any:
        """Maps a hidden state (the first stage: nothing) to the next one, or to the output."""
        self.stage_received = received if self.stage_part.start else None
        args, kwargs = _arguments(self, super().forward, self.stage_inputs)
        self._stage_stand_in(received)
        left = result = None
        try:
            result = self.stage_calling.output(super().forward(*args, **kwargs))
        except _Left as leaving:
            left = leaving.hidden
        if self.stage_received is not None or (left is None) != self.stage_ends:
            raise RuntimeError("the forward skipped a block where its stage begins or ends")
        return result if left is None else left

    def _stage_stand_in(self, received: Any) -> None:
        """Puts zeros that take no memory in place of the parameters of other stages.

        Code before the stage's first block may use them, but its hidden state is replaced."""
        own = next((p for p in self.parameters() if p.is_floating_point()), received)
        if self.stage_filled == (own.dtype, own.device):
            return
        zero = torch.zeros((), dtype=own.dtype, device=own.device)
        for place in self.stage_absent:
            place.fill(zero)
        self.stage_filled = own.dtype, own.device

    def _stage_take_received(self) -> torch.Tensor:
        received, self.stage_received = self.stage_received, None
        if received is None:
            raise RuntimeError(
                "the module runs a block twice where its stage begins: if it recomputes blocks "
                "itself (torch.utils.checkpoint), use train.activation_checkpointing instead"
            )
        return received

    def _stage_enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.stage_blocks[self.stage_part.start - 1].replace(
            args, kwargs, self._stage_take_received()
        )

    def _stage_enter_behind(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = self._stage_take_received()
        return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden

    def _stage_leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise _Left(self.stage_blocks[self.stage_part.stop - 1].get(args, kwargs))

    def _stage_leave_behind(self, module: nn.Module, args: Any, output: Any) -> None:
        raise _Left(first_tensor(output))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(elements {self.stage_part.start} to {self.stage_part.stop - 1})"
        )
