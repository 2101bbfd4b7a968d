"""This module runs a module as its stages will, to see what no graph of a trial in pieces shows."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .pieces import Pieces
from .plan import first_tensor, take_out
from .running import Run, make_twin, run_seeded, same, words


class Passing:
    """Runs a model as a stage does: blocks that it does not hold hand on what they got.

    Those that it holds begin with the hidden state of the trial by pieces, and what they and the
    code between them make of it must be what it was there. holds: for each block. The parameters
    that only the first element uses are zeros, and the last block's result is replaced too."""

    def __init__(self, model: nn.Module, pieces: Pieces, holds: Sequence[bool]) -> None:
        self.pieces, self.plan, self.holds = pieces, pieces.plan, holds
        self.twin = make_twin(model)
        self.problem: str | None = None
        self.given: Any = None  # the hidden state that a block got
        named = dict(self.twin.named_parameters())
        later = {name for used in self.plan.used[1:] for name in used}
        first = {
            named[name] for name in set(self.plan.used[0]) - later if named[name].requires_grad
        }
        for place in take_out(self.twin.modules(), set(named.values()) - first):
            place.fill(torch.zeros(()))

    def check(self, run: Run, output: Any) -> str | None:
        """Returns why the model cannot be cut as planned; None where it can."""
        for i, block in enumerate(self.plan.blocks):
            module = self.twin.get_submodule(block.name)
            module.register_forward_pre_hook(functools.partial(self._enter, i), with_kwargs=True)
            module.register_forward_hook(functools.partial(self._leave, i))
        try:
            if not same(run_seeded(run, self.twin), output):
                self._refuse("what comes behind its blocks")
        except Exception as error:  # a user's module may raise anything
            return self.problem or f"its code cannot run without all of its blocks: {words(error)}"
        return self.problem

    def _refuse(self, what: str) -> None:
        self.problem = self.problem or (
            f"{what} depends on what other blocks computed, beside the hidden state"
        )

    def _enter(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        block, start = self.plan.blocks[i], self.pieces.starts[i]
        self.given = block.get(args, kwargs)
        if i and self.holds[i - 1]:
            if not same(self.given, start):
                self._refuse(f"the code between its blocks {i - 1} and {i}")
            self.given = torch.zeros_like(self.given)
        return block.replace(args, kwargs, start.clone())

    def _leave(self, i: int, module: nn.Module, args: Any, output: Any) -> Any:
        block, last = self.plan.blocks[i], i == len(self.plan.blocks) - 1
        if not same(first_tensor(output), self.pieces.outputs[i]):
            self._refuse(f"its block {block.name}")
        if last:
            return block.pass_on(self.pieces.starts[-1].clone())
        return output if self.holds[i] else block.pass_on(self.given)


def check_passing(model: nn.Module, pieces: Pieces, run: Run, output: Any) -> str | None:
    """Returns why the model cannot be cut by the plan of a trial by pieces; None where it can.

    For each two blocks there is a pass in which a stage holds the later and not the earlier one, so
    that few passes do."""
    num_blocks = len(pieces.blocks)
    for bit in range(max(1, (num_blocks - 1).bit_length())):
        for flip in (False, True):
            holds = [bool(i >> bit & 1) != flip for i in range(num_blocks)]
            if problem := Passing(model, pieces, holds).check(run, output):
                return problem
    return None
