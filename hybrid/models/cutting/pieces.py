"""This module runs a module in pieces, one for each element that it may be cut into."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .plan import Block, CutPlan, first_tensor
from .running import Run, graph_behind, is_equal, run_seeded, same, words


def find_unused(twin: nn.Module, names: Iterable[str], output: Any) -> list[str]:
    """Lists the trainable parameters that are not in the graph of the output.

    Module lists and stacks of matrices inside blocks are left out, since they may be experts to
    which none of the samples was routed."""
    blocks = [twin.get_submodule(name) for name in names]
    lists = [m for x in blocks for m in x.modules() if isinstance(m, nn.ModuleList)]
    experts = {p for m in lists for p in m.parameters()}
    experts |= {p for x in blocks for p in x.parameters() if p.dim() > 2}
    reached = graph_behind(output) | experts
    return [n for n, p in twin.named_parameters() if p.requires_grad and p not in reached]


class Pieces:
    """Runs one forward pass and detaches the hidden state wherever a cut is possible."""

    def __init__(self, twin: nn.Module, names: list[str], unused: list[str]) -> None:
        self.twin = twin
        self.plan = CutPlan(blocks=[Block(name) for name in names], unused=unused)
        self.blocks = [twin.get_submodule(name) for name in names]
        self.starts: list[torch.Tensor] = []  # the leaf that each piece but the first begins with
        self.ends: list[Any] = []  # what each piece returns, with its graph
        self.outputs: list[torch.Tensor] = []  # what each block returns, as it was
        self.passed: Any = None  # what the last block handed on
        inner = {m for block in self.blocks for m in block.modules()}
        self._outer = {name: m for name, m in twin.named_modules() if m not in inner}
        self._buffers: dict[str, torch.Tensor] = {}

    def cut(self, run: Run, output: Any, values: bool = True) -> CutPlan:
        """Returns the plan; `output` is what the model computes without any cut.

        Without `values`, tensors have none, and only their graphs are looked at."""
        self.values = values
        self._buffers = {n: b.clone() for n, b in self._read_buffers().items()} if values else {}
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(functools.partial(self._enter, i), with_kwargs=True)
            block.register_forward_hook(functools.partial(self._leave, i))
        try:
            self._end(run_seeded(run, self.twin))
        except Exception as error:  # a user's module may raise anything
            self._refuse(f"its blocks need more than a hidden state: {words(error)}")
            return self.plan
        if values and not same(self.ends[-1], output):
            self._refuse("its blocks hand on more than a hidden state")
        if len(self.ends) == len(self.blocks) + 2:
            self._read_graphs()
        else:
            self._refuse("its blocks do not run once each in training")
        return self.plan

    def _refuse(self, problem: str) -> None:
        self.plan.problem = self.plan.problem or problem

    def _enter(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        key = _find_hidden(args, kwargs, self.passed)
        if key is None:
            return self._refuse("its blocks take no float tensor")
        block = self.plan.blocks[i]
        block.hidden = key
        return block.replace(args, kwargs, self._detach(block.get(args, kwargs)))

    def _leave(self, i: int, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = first_tensor(output)
        if not isinstance(hidden, torch.Tensor):
            return self._refuse("its blocks return no tensor")
        if self.values:
            self.outputs.append(hidden.detach().clone())
        if i == len(self.blocks) - 1:
            hidden = self._detach(hidden)
        self.passed = hidden
        if isinstance(output, (tuple, list)):
            self.plan.blocks[i].num_outputs = len(output)
            return (hidden, *[_keep_if_traced(x) for x in output[1:]])
        return hidden

    def _detach(self, hidden: torch.Tensor) -> torch.Tensor:
        self._end(hidden)
        self.starts.append(hidden.detach().requires_grad_())
        return self.starts[-1].clone()  # a leaf must not be changed in place

    def _end(self, end: Any) -> None:
        """Ends a piece, and notes the buffers that it changed."""
        self.ends.append(end)
        if not self.values:
            return
        element = len(self.ends) - 1
        for name, new in self._read_buffers().items():
            old = self._buffers.get(name)
            if old is None or not is_equal(old, new):
                self._buffers[name] = new.clone()
                if self.plan.moved.setdefault(name, element) != element:
                    self._refuse(f"the buffer {name} changes in several of its parts")

    def _read_buffers(self) -> dict[str, torch.Tensor]:
        """Returns the buffers outside the blocks."""
        found = {}
        for name, module in self._outer.items():
            for key, tensor in module.named_buffers(recurse=False):
                found[f"{name}.{key}" if name else key] = tensor
        return found

    def _read_graphs(self) -> None:
        own = [set(), *[set(x.parameters()) for x in self.blocks], set()]
        inside = set().union(*own)
        names = {p: name for name, p in self.twin.named_parameters()}
        for i, end in enumerate(self.ends):
            leaves = graph_behind(end)
            outside = (leaves & names.keys()) - inside
            self.plan.used.append([name for p, name in names.items() if p in outside])
            start = {self.starts[i - 1]} if i else set()
            if leaves - outside - own[i] - start:
                what = f"block {i - 1}" if 0 < i <= len(self.blocks) else "its other part"
                self._refuse(f"{what} takes values of other blocks beside the hidden state")
        held = {name for used in self.plan.used for name in [*used, *self.plan.unused]}
        outer = [(p, name) for p, name in names.items() if p.requires_grad and p not in inside]
        if any(name not in held for _, name in outer):
            self._refuse("its blocks hand on more than a hidden state")


def _keep_if_traced(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) and output.grad_fn is not None else None


def _find_hidden(args: Any, kwargs: dict[str, Any], passed: Any) -> int | str | None:
    """Returns where the hidden state is: what the last block returned, or was made of that."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    floats = [(k, x) for k, x in given if isinstance(x, torch.Tensor) and x.is_floating_point()]
    choices = [k for k, x in floats if x is passed]
    choices += [k for k, x in floats if x.requires_grad]
    return next(iter([*choices, *(k for k, _ in floats)]), None)
