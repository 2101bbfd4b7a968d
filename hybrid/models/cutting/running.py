"""This module runs copies of a module for trials, and compares what comes of it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ...job.errors import first_line

TOLERANCE = 1e-4  # relative; the same arithmetic done twice differs by rounding at most
Run = Callable[[nn.Module], Any]


def make_twin(model: nn.Module) -> Any:
    """Copies a model to run it, since it may keep state; parameters are shared."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # torch does not copy these
                shared[id(value)] = value.detach()
    return copy.deepcopy(model, shared).train()


def run_seeded(run: Run, twin: nn.Module) -> Any:
    """Runs a copy with the same random numbers each time."""
    torch.default_generator.manual_seed(0)
    return run(twin)


def words(error: Exception) -> str:
    """Describes an error in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


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


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tells whether two buffers hold the same; what is no number equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def graph_behind(output: Any) -> set[torch.Tensor]:
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
