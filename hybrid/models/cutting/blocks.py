"""This module finds the lists of blocks in a module: by what it holds, and by what runs."""

from collections import Counter
from collections.abc import Iterable

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList


def is_chain(module: nn.Module) -> bool:
    """Tells whether a module is an `nn.Sequential` that runs its children one after another."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def is_list(module: nn.Module) -> bool:
    """Tells whether a module is a list of others: an `nn.ModuleList`, or a chain."""
    listed = isinstance(module, nn.ModuleList) and not isinstance(module, ParametrizationList)
    return listed or is_chain(module)


def _has_forward(module: nn.Module) -> bool:
    """Tells whether a module runs as one; an `nn.ModuleDict` only holds others."""
    return type(module).forward is not nn.Module.forward


def find_blocks(model: nn.Module) -> list[str]:
    """Names the modules in the outermost lists of a model; lists within lists are taken apart."""
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in dict.fromkeys(_walk(model))]


def _walk(module: nn.Module) -> Iterable[nn.Module]:
    listed = is_list(module)
    for name, child in module.named_children():
        runs = listed and _has_forward(child)
        if is_list(child) or not (runs or name == "parametrizations"):
            yield from _walk(child)
        elif listed:
            yield child


def record_calls(model: nn.Module) -> list[str]:
    """Returns a list that a forward pass fills with the names of modules in lists, as they run."""
    calls: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    listed = {child for module in names if is_list(module) for child in module.children()}
    for child in listed:
        child.register_forward_pre_hook(lambda child, _: calls.append(names[child]))
    return calls


def candidates(model: nn.Module, calls: list[str], chains: bool = True) -> list[list[str]]:
    """Returns the runs of blocks that a model may be cut between, the most wanted first.

    First come all blocks of all outermost lists that run once, in the order of `calls`; then each
    list whose modules run once each in order, that with most parameters first. Without `chains`,
    only the `nn.ModuleList` of most parameters counts."""
    counts = Counter(calls)
    sizes: dict[str, int] = {}
    runs: dict[str, list[str]] = {}
    names = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if is_list(module) and (chains or isinstance(module, nn.ModuleList)):
            own = [names[child] for child in module.children()]
            members = set(own)
            if own and [call for call in calls if call in members] == own:
                runs[name] = own
                sizes[name] = sum(p.numel() for p in module.parameters())
    by_size = [runs[name] for name in sorted(runs, key=sizes.__getitem__, reverse=True)]
    if not chains:
        return by_size[:1]
    outermost = set(find_blocks(model))
    every = [call for call in calls if call in outermost and counts[call] == 1]
    found = [run for run in (every, *by_size) if run]
    return [run for i, run in enumerate(found) if run not in found[:i]]
