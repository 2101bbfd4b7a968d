"""This module finds out by trial how a module can be cut into stages; it knows no model by name.

A first forward pass shows which lists of blocks run once each, in order. A second detaches the
hidden state before each block and behind the last, and drops what else blocks return unless it has
a graph. The autograd graph of each detached piece shows what it uses beside the hidden state.
Parameters outside the blocks belong to the pieces that reach them. A piece that reaches into
another block forbids cuts. What leaves no graph, such as a mask made of an earlier hidden state,
shows in a third pass: there each block passes on what it got, as in a stage that does not hold it,
and computes its own from the hidden state of the second pass. All must be as it was."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...job.errors import first_line
from .blocks import candidates, record_calls
from .plan import Block, CutPlan, first_tensor, take_out

TOLERANCE = 1e-4  # relative; the same arithmetic done twice differs by rounding at most
NO_LIST = "it has no nn.ModuleList or nn.Sequential whose modules run once each, in order"
Run = Callable[[nn.Module], Any]


def find_cut(model: nn.Module, run: Run) -> CutPlan:
    """Finds how to cut `model`, which stays as it was; `run` calls a copy on some samples.

    A run that raises, and a model that cannot be copied, cannot be cut."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            twin = make_twin(model)
            calls = record_calls(twin)
            output = run_seeded(run, twin)
        except Exception as error:  # a user's module may raise anything
            return CutPlan(f"a trial with two samples failed: {words(error)}")
        plans: list[CutPlan] = []
        for names in candidates(model, calls):
            pieces = Pieces(make_twin(model), names, find_unused(twin, names, output))
            plan = pieces.cut(run, output)
            plan.problem = plan.problem or Passing(model, pieces).check(run, output)
            if plan.problem is None:
                return plan
            plans.append(plan)
        return plans[-1] if plans else CutPlan(NO_LIST)


def run_seeded(run: Run, twin: nn.Module) -> Any:
    """Runs a copy with the same random numbers each time."""
    torch.default_generator.manual_seed(0)
    return run(twin)


def words(error: Exception) -> str:
    """Describes an error in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def make_twin(model: nn.Module) -> Any:
    """Copies a model to run it, since it may keep state; parameters are shared."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # torch does not copy these
                shared[id(value)] = value.detach()
    return copy.deepcopy(model, shared).train()


def find_unused(twin: nn.Module, names: Iterable[str], output: Any) -> list[str]:
    """Lists the trainable parameters that are not in the graph of the output.

    Module lists and stacks of matrices inside blocks are left out, since they may be experts to
    which none of the samples was routed."""
    blocks = [twin.get_submodule(name) for name in names]
    lists = [m for x in blocks for m in x.modules() if isinstance(m, nn.ModuleList)]
    experts = {p for m in lists for p in m.parameters()}
    experts |= {p for x in blocks for p in x.parameters() if p.dim() > 2}
    reached = _graph_behind(output) | experts
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
            if old is None or not _is_equal(old, new):
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
            leaves = _graph_behind(end)
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


class Passing:
    """Runs a model as its stages will: a block hands on what it got, as where it is not held.

    Each still computes, from its hidden state in the trial by pieces, and is compared."""

    def __init__(self, model: nn.Module, pieces: Pieces) -> None:
        self.pieces, self.plan, self.twin = pieces, pieces.plan, make_twin(model)
        self.problem: str | None = None
        self.given: Any = None  # the hidden state that a block got
        named = dict(self.twin.named_parameters())
        later = {name for used in self.plan.used[1:] for name in used}
        first = {named[name] for name in set(self.plan.used[0]) - later}
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
                self._refuse("what comes behind its blocks depends on more than the last of them")
        except Exception as error:  # a user's module may raise anything
            self._refuse(f"its code beside the blocks depends on what they return: {words(error)}")
        return self.problem

    def _refuse(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _enter(self, i: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        block = self.plan.blocks[i]
        self.given = block.get(args, kwargs)
        return block.replace(args, kwargs, self.pieces.starts[i].clone())

    def _leave(self, i: int, module: nn.Module, args: Any, output: Any) -> Any:
        block = self.plan.blocks[i]
        if not same(first_tensor(output), self.pieces.outputs[i]):
            self._refuse(f"its block {block.name} takes values of other blocks in other ways too")
        last = i == len(self.plan.blocks) - 1
        return block.pass_on(self.pieces.starts[-1].clone() if last else self.given)


def same(one: Any, other: Any) -> bool:
    """Tells whether two results are alike up to rounding."""
    ones, others = tree_leaves(one), tree_leaves(other)
    return len(ones) == len(others) and all(map(_is_alike, ones, others))


def _is_alike(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other)
    if one.shape != other.shape:
        return False
    if not one.is_floating_point() or one.numel() == 0:
        return torch.equal(one, other)
    size = TOLERANCE * float(other.detach().abs().nan_to_num(0.0, 0.0).max())
    return torch.allclose(one.detach(), other.detach(), rtol=0.0, atol=size, equal_nan=True)


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tells whether two buffers hold the same; what is no number equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _keep_if_traced(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) and output.grad_fn is not None else None


def _graph_behind(output: Any) -> set[torch.Tensor]:
    """Returns the leaf tensors of the autograd graph of a result."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    todo, seen = [t.grad_fn for t in tensors], set()
    leaves = {t for t in tensors if t.grad_fn is None and t.requires_grad}
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        todo += [following for following, _ in node.next_functions]
    return leaves


def _find_hidden(args: Any, kwargs: dict[str, Any], passed: Any) -> int | str | None:
    """Returns where the hidden state is: what the last block returned, or was made of that."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    floats = [(k, x) for k, x in given if isinstance(x, torch.Tensor) and x.is_floating_point()]
    choices = [k for k, x in floats if x is passed]
    choices += [k for k, x in floats if x.requires_grad]
    return next(iter([*choices, *(k for k, _ in floats)]), None)
