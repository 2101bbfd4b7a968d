"""This module says how a module is cut: its blocks, and what each of them takes and returns."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn


@dataclass
class Block:
    """Names a block, and says where its hidden state is: what one block hands to the next."""

    name: str
    hidden: int | str = 0  # the position or keyword of the argument
    num_outputs: int | None = None  # if it returns a tuple, of which the hidden state is the first

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Returns the hidden state among the block's arguments."""
        return args[self.hidden] if isinstance(self.hidden, int) else kwargs[self.hidden]

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the block's arguments with another hidden state."""
        if isinstance(self.hidden, int):
            return (*args[: self.hidden], hidden, *args[self.hidden + 1 :]), kwargs
        return args, {**kwargs, self.hidden: hidden}

    def pass_on(self, hidden: torch.Tensor) -> Any:
        """Returns what the block would return if it did not change the hidden state."""
        count = self.num_outputs
        return hidden if count is None else (hidden, *[None] * (count - 1))


@dataclass
class CutPlan:
    """Says how a model is cut into elements, with tensors by name.

    Element 0 is what comes before the n blocks. Elements 1 to n are the blocks, each with what
    comes between it and the next. Element n + 1 is what comes behind the last."""

    problem: str | None = None  # why it cannot be cut
    blocks: list[Block] = field(default_factory=list)
    used: list[list[str]] = field(default_factory=list)  # outside parameters, for each element
    unused: list[str] = field(default_factory=list)  # trainable, but nothing depends on them
    # Buffers outside the blocks that a forward pass changes, with the element that changes them.
    moved: dict[str, int] = field(default_factory=dict)


def first_tensor(output: Any) -> Any:
    """Returns the hidden state in what a block returns."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


class Place(NamedTuple):
    """Tells where a parameter was that a stage does not need."""

    module: nn.Module
    name: str
    shape: torch.Size

    def fill(self, zero: torch.Tensor) -> None:
        """Puts zeros that take no memory there, of the dtype and device of `zero` ([])."""
        self.module.__dict__[self.name] = zero.expand(self.shape)


def take_out(modules: Iterable[nn.Module], keep: set[nn.Parameter]) -> list[Place]:
    """Removes all parameters that are not in `keep` from modules, and returns where they were."""
    absent = []
    for module in modules:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter not in keep:
                del module._parameters[name]
                absent.append(Place(module, name, parameter.shape))
    return absent
